"""Saving and restoring: the state of a training run, and self-contained model directories.

A model directory holds `model.json` (how to build the model, its classes and preprocessing, where
it comes from) and `weights.safetensors` (params and norm_stats, by their paths).
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from kdgqa_jax import vit, workdir
from kdgqa_jax.errors import UserError

WEIGHTS = "weights.safetensors"


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes and dtypes of a tree of arrays, to be restored with one sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class StateCheckpoints:
    """The checkpoints of one run: the whole training state by step, the newest two kept.

    Saving is asynchronous and atomic: a kill at any moment leaves the checkpoints before it.
    """

    def __init__(self, directory: pathlib.Path):
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Save in the background, unless this step is saved already; `position` is JSON."""
        if self.latest_step != step:
            # Without force, a save is skipped while the one before it is under way.
            self._checkpointer.save_async(step, state, custom_metadata=position, force=True)

    @property
    def latest_step(self) -> int | None:
        """The newest step that is saved."""
        latest = self._checkpointer.latest
        return latest.step if latest else None

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state, position) of the newest step; `like` is an abstract state."""
        step = self.latest_step
        position = self._checkpointer.metadata(step).custom_metadata
        return self._checkpointer.load(step, like), position

    def close(self) -> None:
        """Wait for saves under way."""
        self._checkpointer.close()


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
    check_replaceable(path)
    from safetensors.numpy import save_file

    flat = flatten_dict(jax.device_get(variables), sep="/")
    with workdir.written_whole(pathlib.Path(path).absolute()) as folder:
        workdir.write_json(folder / "model.json", description)
        arrays = {name: np.ascontiguousarray(x) for name, x in flat.items()}
        save_file(arrays, folder / WEIGHTS)


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise UserError if something other than a model directory is there."""
    path = pathlib.Path(path).absolute()
    ours = {"model.json", WEIGHTS}
    if os.path.lexists(path) and not (path.is_dir() and set(os.listdir(path)) <= ours):
        raise UserError(
            f"{path} holds something else than a model; move it away, or write elsewhere"
        )


def check_model(path: str | os.PathLike) -> None:
    """Raise UserError unless a model directory is there; its files are not read."""
    path = pathlib.Path(path).absolute()
    if not (path / "model.json").is_file() or not (path / WEIGHTS).is_file():
        raise UserError(f"{path} is not a model directory: it lacks model.json or {WEIGHTS}")


def load_model(
    path: str | os.PathLike,
) -> tuple[vit.VisionTransformer, dict[str, Any], dict[str, Any]]:
    """(model, variables as NumPy arrays, description) of a model directory.

    Raises UserError if the directory does not hold a model, or a damaged one.
    """
    check_model(path)
    path = pathlib.Path(path).absolute()
    description = workdir.read_json(path / "model.json")
    try:
        model, channels = vit.create(**description["model"]), description["channels"]
        shapes = jax.eval_shape(lambda: vit.init_variables(model, jax.random.key(0), channels))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / 'model.json'} does not describe a model ({error!r})") from None
    except UserError as error:
        raise UserError(f"{path / 'model.json'}: {error}") from None
    expected = flatten_dict(shapes, sep="/")
    arrays = _read(path / WEIGHTS)
    wrong = [
        f"{name} ({_shown(arrays.get(name))} there, {_shown(expected.get(name))} in model.json)"
        for name in sorted(expected.keys() | arrays.keys())
        if _shown(arrays.get(name)) != _shown(expected.get(name))
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{path / WEIGHTS} does not fit: {'; '.join(wrong[:4])}{more}")
    return model, unflatten_dict(arrays, sep="/"), description


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except Exception as error:  # a parser of damaged files raises anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason})") from None


def _shown(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
