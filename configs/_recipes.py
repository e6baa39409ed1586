"""How the jobs of the paper are trained: one table of recipes, fitted to model and data.

Recipes were chosen, not searched for: see the docstrings of the configs for what has been run.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, config_dict

from kdgqa_jax import fitting, vit
from kdgqa_jax.config import parse_arg, train_config
from kdgqa_jax.errors import UserError, unknown

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Data:
    """A row of `DATA`.

    Attributes:
      images: how many there are to train on.
      flip: mirrored images show the same.
    """

    images: int
    flip: bool = True


DATA: dict[str, Data] = {
    "imagenet2012": Data(1_281_167),
    "cifar10": Data(50_000),
    "cifar100": Data(50_000),
    "food101": Data(75_750),
    "tiny_imagenet": Data(100_000),
    "oxford_iiit_pet": Data(3_680),
    "cinic10": Data(90_000),
    "mnist": Data(60_000, flip=False),
    "fashion_mnist": Data(60_000),
    "digits": Data(1_437, flip=False),
}
"""Data sets that the configs take by name; others with --config.data.name."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of `RECIPES`: fields of `train_config()` that differ from their defaults.

    Attributes:
      jobs: by job; `warmup_epochs` becomes optim.warmup_steps.
      sizes: by size of the model, a name in `vit.SIZES`.
      flip: mirror images where `DATA` allows it.
    """

    jobs: dict[str, Fields]
    sizes: dict[str, Fields] = dataclasses.field(default_factory=dict)
    flip: bool = False


_MODERN: Fields = {
    "model.dtype": "bfloat16",
    "optim.schedule": "cosine",
    "optim.weight_decay": 0.05,
    "optim.weight_decay_exclude": "bias_and_norm",
    "optim.clip_norm": 1.0,
    "data.augment.label_smoothing": 0.1,
    "data.workers": 8,
}

RECIPES: dict[str, Recipe] = {
    # The defaults of train_config() are the paper's. It does not pretrain: epochs and batches of
    # pretraining are ours.
    "published": Recipe(
        jobs={
            "pretrain": {"epochs": 20.0},
            "uptrain": {"epochs": 1.0},
            "finetune": {"epochs": 5.0, "keep_best": "top1"},
        },
    ),
    # Learning rates of uptraining and fine-tuning are the published 1e-5 per 32 images; pretraining
    # is close to DeiT's (arXiv 2012.12877), without repeated augmentation.
    "modern": Recipe(
        jobs={
            "pretrain": {
                **_MODERN,
                "epochs": 300.0,
                "warmup_epochs": 5.0,
                "batch_size": 1024,
                "optim.learning_rate": 1e-3,
                "ema_decay": 0.9999,
                "eval_every_epochs": 10.0,
                "data.augment.resized_crop": 0.08,
                "data.augment.mixup": 0.8,
                "data.augment.cutmix": 1.0,
                "data.augment.erase": 0.25,
            },
            "uptrain": {
                **_MODERN,
                "epochs": 1.0,
                "warmup_epochs": 0.05,
                "batch_size": 1024,
                "optim.learning_rate": 3.2e-4,
                "ema_decay": 0.99,
                "data.augment.resized_crop": 0.25,
                "data.augment.mixup": 0.2,
                "data.augment.cutmix": 0.2,
            },
            "finetune": {
                **_MODERN,
                "epochs": 20.0,
                "warmup_epochs": 1.0,
                "batch_size": 256,
                "optim.learning_rate": 8e-5,
                "optim.layer_decay": 0.75,
                "ema_decay": 0.999,
                "keep_best": "top1",
                "data.augment.resized_crop": 0.25,
                "data.augment.mixup": 0.8,
                "data.augment.cutmix": 1.0,
            },
        },
        sizes={
            "S": {"model.drop_path": 0.1},
            "B": {"model.drop_path": 0.2},
            "L": {"model.drop_path": 0.3, "model.remat": "dots_no_batch"},
        },
        flip=True,
    ),
}


def set_model(config: ConfigDict, **fields: Any) -> None:
    """Set fields of `config.model`. Raises UserError: a model that cannot be built."""
    for name, value in fields.items():
        config.model[name] = value  # an update would leave None out
    vit.create(**config.model.to_dict())


def make_config(job: str, arg: str, *, recipe: str, dataset: str = "imagenet2012") -> ConfigDict:
    """The config of a job in `RECIPES`.

    Args:
      job: "pretrain", "uptrain" or "finetune".
      arg: "key=value,key=value" with the keys dataset, model, attention, kv (0: half the query
        heads, or what the model in `init` has), recipe and batch (0: the recipe's own).
      recipe: where `arg` has none.
      dataset: where `arg` has none.

    Raises:
      UserError: an unknown key or name, or key/value heads that do not fit the model.
    """
    arg = parse_arg(
        arg, dataset=dataset, model="S/16", attention="mha", kv=0, recipe=recipe, batch=0
    )
    for kind, name, known in (("data set", arg.dataset, DATA), ("recipe", arg.recipe, RECIPES)):
        if name not in known:
            raise unknown(kind, name, known)
    config = train_config()
    set_model(config, name=arg.model, attention=arg.attention, num_kv_heads=arg.kv or None)
    config.data.name = arg.dataset
    if job != "pretrain":
        config.init = config_dict.placeholder(str)  # to be given

    recipe, data, size = RECIPES[arg.recipe], DATA[arg.dataset], arg.model.split("/")[0]
    fields = {**recipe.jobs[job], **recipe.sizes.get(size, {})}
    warmup_epochs = fields.pop("warmup_epochs", 0.0)
    config.update_from_flattened_dict(fields)
    if arg.batch:
        set_batch_size(config, arg.batch)
    # Devices that can split a batch can split those of evaluation.
    config.eval_batch_size = -(-config.eval_batch_size // config.batch_size) * config.batch_size
    config.optim.warmup_steps = round(warmup_epochs * data.images / config.batch_size)
    config.data.augment.flip = recipe.flip and data.flip
    config.microbatch = fitting.AUTO
    return config


def set_batch_size(config: ConfigDict, batch_size: int) -> None:
    """Another batch size, and the learning rate in proportion to it (arXiv 1706.02677).

    The warm-up of a recipe lasts as many epochs as before.

    Raises UserError: no positive number.
    """
    if batch_size < 1:
        raise UserError(f"config argument batch={batch_size} must be positive")
    config.optim.learning_rate *= batch_size / config.batch_size
    config.batch_size = batch_size
