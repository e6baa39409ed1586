"""A few seconds of training on scikit-learn's digits: does everything work on this machine?

    kdgqa train --config testing:attention=dgqa_ema --workdir testing

Arguments: `attention` (kdgqa) and `kv` (half the eight query heads).

Run on two CPU cores that other work kept busy too (Python 3.11, jax 0.10.2, 2026-11-22): 90 updates
of 64 images, about 25 ms each once compiled; 34 to 55 s in all, nearly all of it compilation. Test
top-1: mha 96.11 %, dgqa_ema 97.50 %, kdgqa 93.89 % (one seed, 360 images).
"""

from kdgqa_jax.config import parse_arg, train_config
from kdgqa_jax.configs._recipes import set_model


def get_config(arg=""):
    """The config of one run."""
    arg = parse_arg(arg, attention="kdgqa", kv=0)
    config = train_config()
    model = {"name": "mu/4", "image_size": 8, "window": 10}
    set_model(config, **model, attention=arg.attention, num_kv_heads=arg.kv or None)
    config.data.augment.rand_augment_ops = 0  # too strong for 8x8 pixels
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_steps = 10
    config.batch_size = 64
    config.epochs = 4.0
    config.eval_every_epochs = 2.0
    config.checkpoint_every = 30
    config.log_every = 10
    return config
