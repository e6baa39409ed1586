"""The paper's protocol in small: `kdgqa demo --workdir DIR`.

Pretrain a multi-head ViT of size `mu` on small real images, then convert, uptrain and fine-tune
every variant. Uptraining continues with the pretraining data, as in the paper; fine-tuning adapts
to a shifted version of it: every image turned by 90 degrees and made a negative.

Argument string: `demo:dataset=digits` (default) or `demo:dataset=fashion_mnist`.
"""

from kdgqa_jax.config import parse_arg, study_config
from kdgqa_jax.errors import unknown

PLANS = {
    "digits": {
        "model": "mu/2",
        "side": 8,
        "batch": 64,
        "epochs": (45.0, 7.0),
        "window": 80,
        "rates": {"train": 1_000.0, "evaluate": 3_000.0, "overhead": 10.0},
    },
    "fashion_mnist": {
        "model": "mu/4",
        "side": 28,
        "batch": 128,
        "epochs": (4.0, 1.0),
        "window": 240,
        "rates": {"train": 1_300.0, "evaluate": 4_000.0, "overhead": 10.0},
    },
}
"""epochs: of pretraining, and of uptraining and fine-tuning each; window: two updates of DGQA's
allocation in each of those, at the start and half-way, so that weights have time to follow; rates:
of two CPU cores, roughly, for --dry-run."""


ENTRIES = ("mha", "gqa", "gqa@svd", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa")


def get_config(arg=""):
    """The study of one of `PLANS`."""
    arg = parse_arg(arg, dataset="digits")
    if arg.dataset not in PLANS:
        raise unknown("data set", arg.dataset, PLANS)
    plan = PLANS[arg.dataset]
    config = study_config()
    config.variants = ENTRIES
    for stage in (config.pretrain, config.uptrain, config.finetune):
        stage.model.name = plan["model"]
        stage.model.image_size = plan["side"]
        stage.model.window = plan["window"]
        stage.model.drop_path = 0.1
        stage.model.scan_layers = True  # compiles faster
        stage.data.name = arg.dataset
        stage.data.augment.rand_augment_ops = 0  # too strong for 8x8 pixels
        stage.batch_size = plan["batch"]
        stage.epochs = plan["epochs"][1]
        stage.eval_every_epochs = 0.0  # at the end only
        stage.log_every = 5
        stage.checkpoint_every = 100
        stage.optim.learning_rate = 3e-3
        stage.optim.schedule = "cosine"
        stage.optim.warmup_steps = 20
        stage.optim.weight_decay = 0.3
    config.pretrain.epochs = plan["epochs"][0]
    config.pretrain.model.drop_path = 0.2
    config.pretrain.optim.weight_decay = 0.5
    config.finetune.data.shift = "negative_quarter_turn"
    config.rates.update(plan["rates"])
    return config
