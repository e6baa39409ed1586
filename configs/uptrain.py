r"""Uptraining: a pretrained model whose key/value heads were grouped learns to live with it.

    kdgqa convert --source vit_small.safetensors --attention dgqa_ema --num-kv-heads 3 \
        --out converted
    kdgqa train --config uptrain:model=S/16,attention=dgqa_ema,kv=3,recipe=published \
        --workdir runs/uptrain --config.init=converted --config.data.data_dir=DIR

Arguments: `dataset` (imagenet2012), `model` (S/16), `attention` and `kv` (those of the model in
`init`), `batch` (that of the recipe; the learning rate follows) and `recipe`: `published` (as in
docs/method.md: one epoch, batches of 32, learning rate 1e-5) or `modern` (one epoch in bfloat16,
batches of 1024, see _recipes.py).

Not run at full size: a test builds its models and training steps abstractly.
"""

from kdgqa_jax.configs._recipes import make_config


def get_config(arg=""):
    """The config of one run."""
    return make_config("uptrain", arg, recipe="published")
