"""Model directories: a model and its weights on disk, self-contained.

A model directory holds `model.json` (how to build the model, its classes and preprocessing, where
it comes from) and `weights.safetensors` (params and norm_stats, by their paths).
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdgqa_jax import model_json, paths, storage, vit, workdir
from kdgqa_jax.errors import UserError, one_line, printable

WEIGHTS = "weights.safetensors"


def save_model(
    path: str | os.PathLike, variables: dict[str, Any], description: dict[str, Any]
) -> None:
    """Write a model directory; it appears whole or not at all.

    Args:
      path: the directory; an older model directory there is replaced.
      variables: {"params": ..., "norm_stats": ...}.
      description: JSON values; "model" holds the arguments of `vit.create`, "channels" the number
        of image channels.

    Raises:
      UserError: something else is there, or it cannot be written.
    """
    path = check_replaceable(path)
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    flat = flatten_dict(jax.device_get(variables), sep="/")
    with workdir.written_whole(path) as folder:
        workdir.write_json(folder / "model.json", description)
        arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
        try:
            save_file(arrays, folder / WEIGHTS)
        except SafetensorError as error:  # which is what it makes of an OSError
            raise OSError(str(error)) from None


def check_replaceable(path: str | os.PathLike) -> paths.Path:
    """The absolute path. Raises UserError if something other than a model directory is there."""
    place = paths.absolute(path)
    ours = {"model.json", WEIGHTS, "README.md"}  # the last is a card of what was there
    try:
        taken = paths.taken(place)
        sound = taken and place.is_dir() and {p.name for p in place.iterdir()} <= ours
    except paths.failures(place) as error:
        raise UserError(f"{place} cannot be read ({paths.reason(error)})") from None
    if taken and not sound:
        raise UserError(
            f"{place} holds something else than a model; move it away, or write elsewhere"
        )
    return place


def check_model(path: str | os.PathLike) -> None:
    """Raise UserError unless a model directory is there; its files are not read."""
    place = paths.absolute(path)
    try:
        found = all((place / name).is_file() for name in ("model.json", WEIGHTS))
    except paths.failures(place) as error:
        raise UserError(f"{place} cannot be read ({paths.reason(error)})") from None
    if not found:
        raise UserError(f"{place} is not a model directory: it lacks model.json or {WEIGHTS}")


def load_model(
    path: str | os.PathLike,
) -> tuple[vit.VisionTransformer, dict[str, Any], dict[str, Any]]:
    """(model, variables as NumPy arrays, description) of a model directory.

    Raises UserError if the directory does not hold a model, or a damaged one.
    """
    check_model(path)
    path = storage.fetched(path).absolute()
    description = model_json.read(path / "model.json")
    arrays = _read(path / WEIGHTS)
    model, shapes = model_json.build(description, arrays, path / "model.json")
    check_arrays(f"{path / WEIGHTS} does not fit model.json", arrays, shapes)
    return model, unflatten_dict(arrays, sep="/"), description


def check_arrays(what: str, there: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError, which begins with `what`, unless arrays agree by name, shape and dtype.

    Both are nested dicts, or flat ones by path.
    """
    here, there = (flatten_dict(tree, sep="/") for tree in (expected, there))
    wrong = [
        f"{printable(name)[:200]} ({_shown(there.get(name))} there,"
        f" {_shown(here.get(name))} expected)"
        for name in sorted(here.keys() | there.keys())
        if _shown(there.get(name)) != _shown(here.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{what}: {'; '.join(wrong[:4])}{more}")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:  # a parser of damaged files raises anything
        reason = one_line(error)
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason})") from None


def _shown(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
