"""Rules of conversion compared: zero-shot, and over the length of uptraining.

    kdgqa study --config pooling:kv=4 --workdir DIR --config.variants=gqa,gqa@svd,gqa@svd+refit

A multi-head ViT (2 layers, 8 heads of width 16, 17 tokens) is trained on Fashion-MNIST for 6
epochs; every entry is converted, evaluated at once, and uptrained for 50, 200 and 500 steps. All
variants by all rules are 50 entries; --config.variants takes a part of them. docs/merging.md says
what has been run, on which hardware, and what came out; the whole has not been run.

Argument string: `pooling:data_dir=DIR,kv=2` (kv: key/value heads; default 4).
"""

from kdgqa_jax.config import parse_arg, study_config
from kdgqa_jax.configs._studies import RATES

RULES = (
    *("mean", "first", "random", "procrustes+free", "procrustes", "svd+free", "svd"),
    *("mean+refit", "svd+free+refit", "svd+refit"),
)
VARIANTS = ("gqa", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa")


def get_config(arg=""):
    """The study of all variants and rules."""
    arg = parse_arg(arg, data_dir="/usr/share/datasets/fashion-mnist", kv=4)
    config = study_config()
    config.variants = tuple(f"{variant}@{rule}" for variant in VARIANTS for rule in RULES)
    config.num_kv_heads = arg.kv
    config.uptrain_steps = (50, 200, 500)
    for stage in (config.pretrain, config.uptrain, config.finetune):
        stage.model.name = "mini/7"
        stage.model.image_size = 28
        stage.model.scan_layers = True  # compiles faster
        stage.data.name = "fashion_mnist"
        stage.data.data_dir = arg.data_dir
        stage.data.on_device = True
        stage.data.augment.rand_augment_ops = 0  # a few epochs do not overfit
        stage.batch_size = 128
        stage.log_every = 100
        stage.checkpoint_every = 1000
        stage.optim.schedule = "cosine"
        stage.optim.weight_decay = 0.05
    config.pretrain.epochs = 6.0
    config.pretrain.optim.learning_rate = 2e-3
    config.pretrain.optim.warmup_steps = 200
    config.uptrain.eval_every_epochs = 0.0  # at the end only
    config.uptrain.model.window = 50
    config.uptrain.optim.learning_rate = 5e-4
    config.uptrain.optim.warmup_steps = 10
    config.finetune.epochs = 0.0
    config.rates.update(RATES)
    return config
