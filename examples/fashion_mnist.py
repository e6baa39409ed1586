"""A small ViT on Fashion-MNIST: `kdgqa train --config examples/fashion_mnist.py:job=pretrain ...`.

Jobs: pretrain (4 epochs), uptrain (1 epoch, on the same images) and finetune (2 epochs on
images that are turned by 90 degrees and negative). What came out: docs/fashion_mnist.md.
"""

from kdgqa_jax.config import parse_arg, train_config
from kdgqa_jax.errors import unknown

EPOCHS = {"pretrain": 4.0, "uptrain": 1.0, "finetune": 2.0}


def get_config(arg=""):
    """The config of one job."""
    arg = parse_arg(arg, job="pretrain")
    if arg.job not in EPOCHS:
        raise unknown("job", arg.job, EPOCHS)
    config = train_config()
    if arg.job == "pretrain":  # the others take the model over
        config.model.name, config.model.image_size = "mini/7", 28
    config.model.scan_layers = True
    config.model.window = 150
    config.data.name = "fashion_mnist"
    config.data.on_device = True
    config.data.augment.rand_augment_ops = 0
    config.data.shift = "negative_quarter_turn" if arg.job == "finetune" else "none"
    config.batch_size = 128
    config.epochs = EPOCHS[arg.job]
    config.log_every = 20
    config.optim.learning_rate = 2e-3 if arg.job == "pretrain" else 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 0.05
    return config
