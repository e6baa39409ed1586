r"""Fine-tuning of an uptrained model on a smaller data set; the best model by top-1 is kept too.

    kdgqa train --config finetune:dataset=cifar100,model=B/16,attention=kdgqa,kv=6 \
        --workdir runs/finetune --config.init=runs/uptrain/model --config.data.data_dir=DIR

Arguments: `dataset` (cifar10; also cifar100, food101, tiny_imagenet and the others of
_recipes.DATA), `model` (S/16), `attention` and `kv` (those of the model in `init`), `batch`
(that of the recipe; the learning rate follows) and `recipe`: `published` (as in docs/method.md:
five epochs, batches of 32, learning rate 1e-5) or `modern`
(twenty epochs in bfloat16, batches of 256, layer-wise learning rate decay, see _recipes.py).

Not run at full size: a test builds its models and training steps abstractly.
"""

from kdgqa_jax.configs._recipes import make_config


def get_config(arg=""):
    """The config of one run."""
    return make_config("finetune", arg, recipe="published", dataset="cifar10")
