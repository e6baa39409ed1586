"""Every field of every config, with its default: the published recipe.

Configs live in configs/NAME.py as `get_config(arg)`; structure goes into the argument string
(`finetune:dataset=digits,model=S/16`), scalars into `--config.x=`.
"""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
import pkgutil
from typing import Any

from ml_collections import ConfigDict, config_dict

from kdgqa_jax import options, vit
from kdgqa_jax.data import augment
from kdgqa_jax.errors import LARGEST, SEEDS, UserError, one_line, unknown
from kdgqa_jax.options import SIZE


def _model_config() -> ConfigDict:
    """Options of `vit.create`, with their defaults; what the name of a model says is left out."""
    known = vit.known_options()
    by_name = options.names(known, SIZE)
    fields = {name: _default(known[name]) for name in known if name not in by_name}
    typed = {
        "name": "S/16",
        "attention": "mha",
        "scan_layers": config_dict.placeholder(bool),  # None: as the platform has it faster
        "dtype": "float32",
        "param_dtype": "float32",
    }
    return ConfigDict({**fields, **typed}, type_safe=False)


def _default(field: dataclasses.Field) -> Any:
    """Of an option; None keeps the type of what may take its place."""
    missing = field.default in (None, dataclasses.MISSING)
    return config_dict.placeholder(options.kind(field) or str) if missing else field.default


def train_config() -> ConfigDict:
    """All fields of a training run; the defaults are the paper's recipe (docs/method.md).

    Values are checked by `check_fields` when a run starts, not when they are set.
    """
    return ConfigDict(
        {
            "seed": 42,
            # A model that the run starts from, whatever `convert.load` reads; "": new weights;
            # None: a config that needs one, and is not run without.
            "init": "",
            "model": _model_config(),
            "data": {
                "name": "digits",
                "data_dir": "",
                "shift": "none",  # a name in data.sources.SHIFTS
                # Drawn by the seed of the run (data.subsets); test images by a fixed one.
                "train_share": 1.0,  # of the images to train on
                "test_share": 1.0,
                "label_noise": 0.0,  # share of training labels that are wrong
                "mean": 0.5,  # of pixel values in 0..1: one number, or one per channel
                "std": 0.5,
                # How the host brings images to one size: data.images.Preprocessing.
                "resize": "squash",
                "interpolation": "bilinear",
                "crop_share": 1.0,
                "rounding": "nearest",
                "skip_corrupt": False,  # count images that cannot be read, take the next one
                "workers": 0,  # processes that read ahead; 0: threads
                "on_device": False,  # the whole training split in device memory
                "augment": augment.augment_config(),
            },
            "optim": {
                "learning_rate": 1e-5,
                "schedule": "constant",  # a name in optim.SCHEDULES
                "warmup_steps": 0,
                "cooldown_steps": 0,  # at the end, linearly to zero
                "final_fraction": 0.0,  # of learning_rate: what it ends with, or is at least
                "decay_steps": 10_000,  # of the schedules step, exponential and rsqrt
                "decay_rate": 0.1,  # per decay_steps, of step and exponential
                "beta1": 0.9,
                "beta2": 0.999,
                "eps": 1e-8,
                "mu_dtype": "float32",  # of the first moment: float32 or bfloat16
                "weight_decay": 0.01,
                "weight_decay_exclude": "none",  # a name in optim.WITHOUT_DECAY
                "clip_norm": 0.0,  # largest global norm of the gradients; 0: off
                "layer_decay": 1.0,  # factor of the learning rate per layer down; 1: off
                "freeze": (),  # patterns of parameter names: optim.trainable
            },
            "batch_size": 32,  # images per update, over all devices
            # For less memory, a batch is processed in `accumulate` parts, or in more of them, so
            # that no device has more than `microbatch` images at once; 0: no limit, -1: by the
            # memory of the device.
            "accumulate": 1,
            "microbatch": 0,
            "epochs": 5.0,
            "ema_decay": 0.0,  # of the moving average of weights that is evaluated; 0: none
            "on_nonfinite": "stop",  # or "skip": leave the update out and count it
            # Devices that share parameters, and heads and MLP; all others share the batch.
            "mesh": {"fsdp": 1, "model": 1},
            "eval_batch_size": 256,
            "eval_every_epochs": 1.0,  # 0: at the end only
            "keep_best": "",  # top1, top5 or loss: keep the best model on the test split in best/
            "checkpoint_every": 500,  # steps
            "keep_checkpoints": 2,
            "log_every": 50,  # steps
            "logs": {"tensorboard": False, "wandb": ""},  # wandb: a project
        },
        type_safe=False,
    )


def study_config() -> ConfigDict:
    """All fields of a study: the protocol over a grid of cells and seeds (docs/studies.md)."""
    return ConfigDict(
        {
            # Entries of the table, VARIANT or VARIANT@RULE: see entry.py.
            "variants": ("mha", "gqa", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa"),
            # Further axes, "FIELD=VALUE|VALUE": see grid.py.
            "grid": (),
            "num_kv_heads": config_dict.placeholder(int),  # None: half the query heads
            "pooling": "mean",  # the rule of variants without one
            "calibration_images": 512,  # the first ones that uptraining trains on
            # Lengths of uptraining in steps, a run for each; (): uptrain.epochs.
            "uptrain_steps": (),
            "seed": 42,  # of the first run; the others count up from it
            "seeds": 1,  # how many
            # Names in probes.PROBES, of frozen features, after the stages (grid.STAGES) in probed.
            "probes": (),
            "probed": ("converted",),
            # epochs=0: every cell starts from the model in pretrain.init, as it is
            "pretrain": train_config(),
            "uptrain": train_config(),
            "finetune": train_config(),  # this and uptrain: epochs=0 leaves the stage out
            # For --dry-run, as long as nothing has been measured; 0: unknown.
            "rates": {
                "train": 0.0,  # images/s
                "evaluate": 0.0,  # images/s; also of features
                "overhead": 0.0,  # seconds of every stage: compiling, loading, saving
            },
        },
        type_safe=False,
    )


# --- finding, changing and checking configs -----------------------------------------------------


def config_names() -> list[str]:
    """Names of the configs that come with the package; what begins with _ is shared by them."""
    package = importlib.import_module("kdgqa_jax.configs")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def load_config(name: str) -> ConfigDict:
    """The config `NAME[:arg]`, where NAME is one of `config_names()` or a path to a .py file.

    Raises UserError: no such config or argument, or a file that gives none.
    """
    name, _, arg = name.partition(":")
    if name.endswith(".py"):
        return _load_file(name, arg)
    if name not in config_names():
        raise unknown("config", name, config_names())
    return importlib.import_module(f"kdgqa_jax.configs.{name}").get_config(arg)


def _load_file(name: str, arg: str) -> ConfigDict:
    if not pathlib.Path(name).is_file():
        raise UserError(f"config file {name} not found")
    spec = importlib.util.spec_from_file_location("user_config", name)
    assert spec and spec.loader  # as every name in .py has
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"config file {name} has no function get_config(arg)")
        config = module.get_config(arg)
    except UserError:
        raise
    except Exception as error:  # whatever the code of the file raises
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"config file {name} does not work ({reason})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of the config file {name} returns {one_line(repr(config), 80)}; expected"
            " what train_config() or study_config() of kdgqa_jax.config gives, with its changes"
        )
    return config


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """The argument string of a config: "key=value,key=value" -> values of the defaults' types."""
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise unknown("config argument", key, defaults)
        if not equals:
            raise UserError(f"config argument {item!r} must have the form {key}=VALUE")
        kind = type(defaults[key])
        try:
            values[key] = kind(text)
        except ValueError:
            raise UserError(f"config argument {item!r} must be a {kind.__name__}") from None
    return ConfigDict(values)


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, tuple[type, Any]]:
    """Type and value by dotted name of every field that is not a section."""
    fields: dict[str, tuple[type, Any]] = {}
    for key in config:
        if isinstance(config[key], ConfigDict):
            fields |= _fields(config[key], f"{prefix}{key}.")
        else:
            fields[prefix + key] = config.get_type(key), config[key]
    return fields


ONE_OR_SEVERAL = ("image_size", "mean", "std")
"""Fields that take a number or several: (height, width), or one per channel."""


def _parse(field: str, text: str, kind: type, value: Any) -> Any:
    item = (type(value[0]) if value else str) if kind is tuple else kind
    several = "," in text if field.split(".")[-1] in ONE_OR_SEVERAL else kind is tuple
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return tuple(map(item, filter(None, text.split(",")))) if several else item(text)
    except (ValueError, KeyError):
        expected = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise UserError(f"config field {field}={text!r} must be {expected}") from None


def override(config: ConfigDict, arguments: list[str]) -> ConfigDict:
    """Apply `--config.FIELD=VALUE` arguments; values are parsed by the type of the field.

    Raises UserError: another kind of argument, an unknown field, a value of another type.
    """
    config, fields = config.copy_and_resolve_references(), _fields(config)
    for argument in arguments:
        if not argument.startswith("--config."):
            raise UserError(
                f"unknown argument {argument!r}; config fields are --config.FIELD=VALUE"
            )
        field, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"{argument!r} must have the form --config.{field}=VALUE")
        if field not in fields:
            raise unknown("config field", field, fields)
        kind, value = fields[field]
        if kind is type(None):  # of a copy, in which an empty field has lost its type
            kind = _fields(_schema(config))[field][0]
        config.update_from_flattened_dict({field: _parse(field, text, kind, value)})
    return config


def _schema(config: ConfigDict) -> ConfigDict:
    return study_config() if "variants" in config else train_config()


def check_fields(config: ConfigDict, schema: ConfigDict, prefix: str = "") -> None:
    """Raise UserError for a field that does not fit the schema.

    One that it does not have, that is missing, of another type, or a number that is not finite or
    beyond all use. None is for fields that have it for a default, and for `init`, to be given.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"config section {prefix.rstrip('.')}={config!r} must have fields")
    for key in config:
        if key not in schema:
            raise unknown("config field", prefix + key, [prefix + known for known in schema])
    for key, default in schema.items():
        name = prefix + key
        if key not in config:
            raise UserError(f"config field {name} is missing (default {default!r})")
        value = config[key]
        if isinstance(default, ConfigDict):
            check_fields(value, default, f"{name}.")
        elif value is None and (default is None or key == "init"):
            continue
        else:
            several = key in ONE_OR_SEVERAL and isinstance(value, tuple | list) and value
            for x in value if several else [value]:
                _check_value(name, x, schema.get_type(key))


_KINDS: dict[type, tuple[type, ...]] = {float: (float, int), tuple: (tuple, list)}
"""What a field takes besides values of its own type."""


def _check_value(name: str, value: Any, kind: type) -> None:
    shown = f"config field {name}={one_line(repr(value), 80)}"
    if kind is type(None):
        return
    flag = isinstance(value, bool)
    if flag != (kind is bool) or not isinstance(value, _KINDS.get(kind, kind)):
        raise UserError(f"{shown} must be a {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown} must be a finite number")
    largest = SEEDS[-1] if name.endswith("seed") else LARGEST
    if isinstance(value, int) and abs(value) > largest:
        raise UserError(f"{shown} is too large: at most {largest}")
