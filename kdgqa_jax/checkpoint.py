"""Saving and restoring: the state of a training run, and self-contained model directories.

A model directory holds `model.json` (how to build the model, its classes and preprocessing, where
it comes from) and `weights` (params and norm_stats, written by Orbax).
"""

import os
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from kdgqa_jax import vit, workdir
from kdgqa_jax.errors import UserError


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
            self._checkpointer.save_async(step, state, custom_metadata=position)

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
      path: the directory; an older one there is replaced.
      variables: {"params": ..., "norm_stats": ...}.
      description: JSON values; "model" holds the arguments of `vit.create`, "channels" the number
        of image channels.
    """
    with workdir.written_whole(pathlib.Path(path).absolute()) as folder:
        workdir.write_json(folder / "model.json", description)
        ocp.save(folder / "weights", {name: tree for name, tree in variables.items() if tree})


def load_model(
    path: str | os.PathLike,
) -> tuple[vit.VisionTransformer, dict[str, Any], dict[str, Any]]:
    """(model, variables, description) of a model directory.

    Raises UserError if the directory does not hold a model.
    """
    path = pathlib.Path(path).absolute()
    if not (path / "model.json").is_file() or not (path / "weights").is_dir():
        raise UserError(f"{path} is not a model directory: it lacks model.json or weights")
    description = workdir.read_json(path / "model.json")
    model = vit.create(**description["model"])
    shapes = jax.eval_shape(
        lambda: vit.init_variables(model, jax.random.key(0), description["channels"])
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    variables = ocp.load(path / "weights", abstract(shapes, device))
    return model, variables, description
