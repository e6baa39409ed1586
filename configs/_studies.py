"""What the configs of studies share: the protocol from scratch on a small data set, by a table."""

from typing import Any

from ml_collections import ConfigDict

from kdgqa_jax.config import study_config
from kdgqa_jax.errors import unknown

SECTIONS = ("pretrain", "uptrain", "finetune")
SIX = ("mha", "gqa", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa")
FASHION_DIR = "/usr/share/datasets/fashion-mnist"
"""Where Debian's dataset-fashion-mnist puts its files."""

PLANS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {
        "model": "mini/7", "side": 28, "batch": 128, "epochs": (6.0, 1.0, 1.0), "rate": 2e-3,
        "warmup": 200, "window": 100, "on_device": True,
    },
    "digits": {
        "model": "mu/4", "side": 8, "batch": 64, "epochs": (20.0, 2.0, 4.0), "rate": 3e-3,
        "warmup": 20, "window": 10, "on_device": False,
    },
}  # fmt: skip
"""By data set. epochs: of pretraining, uptraining and fine-tuning; rate: the learning rate of
pretraining, of which uptraining and fine-tuning have a quarter."""

RATES = {"train": 2_000.0, "evaluate": 5_000.0, "overhead": 6.0}
"""Of a `mini/7` on Fashion-MNIST, as `study_config` has them, for two CPU cores that are both busy:
measured were 0.94 ms of CPU time an image to train on, 0.32 ms an image to evaluate, and 12 s for
compiling, loading and saving (Python 3.11, jax 0.10.2)."""


def from_scratch(dataset: str, data_dir: str) -> ConfigDict:
    """A study that pretrains on a data set and fine-tunes on a turned and inverted version of it.

    Raises UserError: a data set that is not in `PLANS`.
    """
    if dataset not in PLANS:
        raise unknown("data set", dataset, PLANS)
    plan = PLANS[dataset]
    config = study_config()
    config.variants = SIX
    for section, epochs in zip(SECTIONS, plan["epochs"], strict=True):
        stage = config[section]
        stage.model.name = plan["model"]
        stage.model.image_size = plan["side"]
        stage.model.window = plan["window"]
        stage.model.scan_layers = True  # compiles faster
        stage.data.name = dataset
        stage.data.data_dir = data_dir if dataset == "fashion_mnist" else ""
        stage.data.on_device = plan["on_device"]
        stage.data.augment.rand_augment_ops = 0  # too strong for small images
        stage.batch_size = plan["batch"]
        stage.epochs = epochs
        stage.eval_every_epochs = 0.0  # at the end only
        stage.log_every = 20
        stage.checkpoint_every = 500
        stage.optim.learning_rate = plan["rate"] / (1 if section == "pretrain" else 4)
        stage.optim.schedule = "cosine"
        stage.optim.warmup_steps = plan["warmup"] if section == "pretrain" else 10
        stage.optim.weight_decay = 0.05
    config.finetune.data.shift = "negative_quarter_turn"
    config.rates.update(RATES)
    return config
