"""model.json: what a model directory says of its model, checked before anything is built."""

import pathlib
from typing import Any

from kdgqa_jax import options, vit, workdir
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.errors import UserError, one_line
from kdgqa_jax.kernels import EXPANSIONS
from kdgqa_jax.options import ARCHITECTURE, CONVERSION, SIZE


def _sizes() -> list[str]:
    """Options of `vit.create` that cannot be larger than the number of all weights."""
    known = vit.known_options()
    of_the_model = options.names(known, SIZE, CONVERSION, ARCHITECTURE)
    return [name for name in of_the_model if options.kind(known[name]) is int]


def read(path: pathlib.Path) -> dict[str, Any]:
    """A model.json whose fields are of the kinds that they have to be.

    Raises UserError: not there, no JSON, or a field that is missing or of another kind.
    """
    description = workdir.read_json(path)
    if not isinstance(description, dict):
        raise UserError(f"{path} does not describe a model: expected a JSON object")
    description = {"class_names": [], "preprocessing": {}, "converted": {}, **description}
    kinds = {"model": dict, "channels": int, "class_names": list, "preprocessing": dict,
             "converted": dict}  # fmt: skip
    for name, kind in kinds.items():
        if type(description.get(name)) is not kind:
            there = f"{name}={_shown(description[name])}" if name in description else f"no {name}"
            raise UserError(f"{path} does not describe a model: {there}; expected {_NAMES[kind]}")
    if not all(isinstance(name, str) for name in description["class_names"]):
        raise UserError(f"{path} does not describe a model: class_names that are no strings")
    check_preprocessing(description["preprocessing"], path)
    description["model"] = current_options(description["model"])
    return description


def current_options(written: dict[str, Any]) -> dict[str, Any]:
    """Options of `vit.create` as this version has them, from those that any version has written."""
    expansion = written.get("implementation")
    if expansion in tuple(EXPANSIONS):  # which is what it was before there were kernels
        return {**written, "implementation": None, "expansion": expansion}
    return written


def check_preprocessing(fields: dict[str, Any], place: Any) -> Preprocessing:
    """`Preprocessing` of these fields. Raises UserError, which names the place, if it is none."""
    try:
        return Preprocessing(**fields)
    except (UserError, TypeError) as error:
        raise UserError(f"{place}: unknown preparation of images ({one_line(error)})") from None


def build(
    description: dict[str, Any], arrays: dict[str, Any], path: pathlib.Path
) -> tuple[vit.VisionTransformer, dict[str, Any]]:
    """(model, shapes of its variables) as a model.json describes it.

    Args:
      description: from `read`.
      arrays: the weights by path, which bound what can be described.
      path: of the model.json.

    Raises:
      UserError: options of no model, or of one that is larger than the weights.
    """
    arguments, channels = description["model"], description["channels"]
    total = sum(x.size for x in arrays.values())
    layers = max((_layers_of(name, x) for name, x in arrays.items()), default=0)
    limits = {
        **dict.fromkeys(_sizes(), total),
        "depth": max(layers, len(arrays)),
        "channels": total,
    }
    for name, value in {**arguments, "channels": channels}.items():
        if name in limits and isinstance(value, int) and value > limits[name]:
            raise UserError(
                f"{path}: {name}={_shown(value)} does not fit the weights beside it, which have"
                f" {total:,} numbers in {len(arrays):,} arrays"
            )
    try:
        model = vit.create(**arguments)
        shapes = vit.variable_shapes(model, channels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever building a model of such options raises
        raise UserError(f"{path} does not describe a model ({one_line(repr(error))})") from None
    names = description["class_names"]
    if names and len(names) != model.num_classes:
        raise UserError(f"{path}: {len(names)} class_names for {model.num_classes} classes")
    return model, shapes


def _layers_of(name: str, x: Any) -> int:
    """The number of scanned layers that an array belongs to."""
    return x.shape[0] if "/blocks/" in name and x.size else 0


_NAMES = {dict: "a JSON object", list: "a list", int: "a whole number"}


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
