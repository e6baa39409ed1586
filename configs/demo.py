"""The paper's protocol in small: `kdgqa demo --workdir DIR`.

Pretrain a multi-head mu/2 ViT on real images, then convert, uptrain and fine-tune every variant.
Uptraining goes on with the pretraining data, as in the paper; fine-tuning adapts to a shifted
version of it: every image turned by 90 degrees and made a negative.

Argument string: `demo:dataset=digits` (default) or `demo:dataset=fashion_mnist`.
"""

from kdgqa_jax.config import parse_arg, study_config

# epochs of (pretraining, uptraining, fine-tuning), and the DGQA window in steps
PLANS = {
    "digits": {"epochs": (40.0, 8.0, 16.0), "window": 20},
    "fashion_mnist": {"epochs": (3.0, 0.5, 1.0), "window": 50},
}


def get_config(arg=""):
    """The study of one of `PLANS`."""
    arg = parse_arg(arg, dataset="digits")
    plan = PLANS.get(arg.dataset, PLANS["digits"])
    config = study_config()
    stages = (config.pretrain, config.uptrain, config.finetune)
    for stage, epochs in zip(stages, plan["epochs"], strict=True):
        stage.model.name = "mu/2" if arg.dataset == "digits" else "mu/4"
        stage.model.image_size = 8 if arg.dataset == "digits" else 28
        stage.model.window = plan["window"]
        stage.model.scan_layers = True  # compiles faster
        stage.data.name = arg.dataset
        stage.batch_size = 64
        stage.epochs = epochs
        stage.eval_every_epochs = 0.0
        stage.log_every = 5
        stage.checkpoint_every = 100
        stage.optim.learning_rate = 1e-3
        stage.optim.schedule = "cosine"
        stage.optim.warmup_steps = 20
    config.pretrain.optim.weight_decay = 0.05
    config.finetune.data.shift = "negative_quarter_turn"
    return config
