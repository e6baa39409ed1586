"""A multi-head (or any other) ViT from new weights.

    kdgqa train --config pretrain:model=S/16 --workdir runs/pretrain --config.data.data_dir=DIR

Arguments: `dataset` (imagenet2012), `model` (S/16), `attention` (mha), `kv` (half the query heads),
`recipe` (modern) and `batch` (that of the recipe; the learning rate follows). The paper starts from
models that others have pretrained; its recipe, a constant learning rate of 1e-5, is there as
`recipe=published`, for 20 epochs.

Not run at full size: a test builds its models and training steps abstractly.
"""

from kdgqa_jax.configs._recipes import make_config


def get_config(arg=""):
    """The config of one run."""
    return make_config("pretrain", arg, recipe="modern")
