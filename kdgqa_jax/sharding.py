"""The mesh of devices and how arrays lie on it. One device is a mesh of one."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdgqa_jax.errors import UserError

AXES = ("data", "fsdp", "model")
_BATCH = PartitionSpec(("data", "fsdp"))

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/(query|key|value)/kernel$", ("fsdp", "model", None)),  # DNH, DKH
    (r"attn/(query|key|value)/bias$", ("model", None)),  # NH, KH
    (r"attn/out/kernel$", ("model", None, "fsdp")),  # NHD
    (r"mlp/(fc1|gate)/kernel$", ("fsdp", "model")),  # DM
    (r"mlp/(fc1|gate)/bias$", ("model",)),  # M
    (r"mlp/fc2/kernel$", ("model", "fsdp")),  # MD
    (r"patch_embed/kernel$", (None, None, None, "fsdp")),  # PPCD
    (r"pos_embed$", (None, None, "fsdp")),  # 1SD
    (r"(head|head_dist|pre_logits)/kernel$", ("fsdp", None)),  # D, classes
)
"""What the last axes of an array are split over, by the end of its path.

The first rule that matches counts; the rest is on every device. They hold for parameters and for
whatever has their paths: moments of the optimizer, averages of weights.
"""


def make_mesh(fsdp: int = 1, model: int = 1) -> Mesh:
    """All devices of all processes on a mesh with the axes (data, fsdp, model).

    Batches are split over data and fsdp, parameters and the optimizer's state over fsdp, attention
    heads and the MLP over model. The axis data takes the devices that are left.

    Raises UserError: sizes that do not divide the devices (of one process, for model).
    """
    devices, local = jax.device_count(), jax.local_device_count()
    if fsdp < 1 or model < 1 or devices % (fsdp * model) or local % model:
        raise UserError(
            f"mesh.fsdp={fsdp} times mesh.model={model} must divide the {devices} devices, and"
            f" mesh.model the {local} of one process"
        )
    shape = (devices // (fsdp * model), fsdp, model)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the devices, but for those along `model`: batches."""
    return NamedSharding(mesh, _BATCH)


def by_rules(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a tree (of arrays or their shapes), by `RULES`.

    An axis that cannot be divided evenly is not split: with fewer key/value heads than devices
    along `model`, every device has all of them.
    """

    def of(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names = next((names for rule, names in RULES if re.search(rule, name)), ())
        names = (None,) * (x.ndim - len(names)) + names  # stacked layers have an axis more
        spec = [
            axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(names, x.shape, strict=True)
        ]
        while spec and spec[-1] is None:  # one way to write each sharding
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(of, tree)


# --- inside of a program that is traced ---------------------------------------------------------


def jit_for(
    mesh: Mesh | None, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` with `options` for a mesh, which `split_batch` and `platform` see while it traces.

    A program that is compiled ahead of time for other devices is so made for their platform. None:
    plain `jax.jit`.
    """
    if mesh is None:
        return functools.partial(jax.jit, **options)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*arguments: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments)

        return jax.jit(traced, **options)

    return decorate


def is_automatic(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether it is one of `make_mesh`, whose partitioner is at work."""
    return set(AXES) <= set(mesh.axis_names) and mesh.are_all_axes_auto


def split_batch(x: jax.Array) -> jax.Array:
    """The same activations, split over the devices by their leading axis and by no other.

    Without this the partitioner may follow a parameter that is split over `fsdp`: it gathers the
    batch and splits the model width instead. Outside of `jit_for` nothing happens.
    """
    automatic = is_automatic(jax.sharding.get_abstract_mesh())
    return jax.lax.with_sharding_constraint(x, _BATCH) if automatic else x


def on_each_device(function: Callable[..., Any], batch_size: int) -> Callable[..., Any]:
    """`function` of arrays with a leading batch axis, each device working on its own examples.

    The partitioner would gather the batch for a loop over examples. Outside of `jit_for`, and for a
    batch that the devices do not divide, it is `function` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_automatic(mesh) or batch_size % batch_devices(mesh):
        return function
    return jax.shard_map(function, in_specs=_BATCH, out_specs=_BATCH, check_vma=False)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of `jit_for`, else that of JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


# --- batches ------------------------------------------------------------------------------------


def batch_devices(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """How many devices a batch is split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raise UserError unless a batch, or each of its `parts`, can be split over the devices."""
    count = batch_devices(mesh)
    if batch_size < 1 or batch_size % (count * parts):
        of = f"{parts} x {count}" if parts > 1 else f"{count}"
        what = "accumulate x devices" if parts > 1 else "devices"
        next_one = max(-(-batch_size // (count * parts)), 1) * count * parts
        raise UserError(
            f"{name}={batch_size} must be a positive multiple of {of} ({what});"
            f" {name}={next_one} is one"
        )


def next_batch_size(batch_size: int, mesh: Mesh) -> int:
    """The least batch size from this one on that can be split over the devices."""
    count = batch_devices(mesh)
    return -(-batch_size // count) * count


def microbatches(batch_size: int, mesh: Mesh, at_least: int = 1, largest: int = 0) -> int:
    """In how many parts a batch is processed, one after the other, each split over all devices.

    Args:
      batch_size: images of the batch.
      mesh: the devices.
      at_least: how many parts there are at least.
      largest: images of a part that fit on one device; 0: any number.

    Raises:
      UserError: a batch that cannot be split over the devices, or into `at_least` parts.
    """
    check_batch_size("batch_size", batch_size, mesh, at_least)
    per_device = batch_size // batch_devices(mesh)
    largest = largest or per_device
    small = [n for n in range(1, math.isqrt(per_device) + 1) if per_device % n == 0]
    divisors = (*small, *(per_device // n for n in small))
    return min(n for n in divisors if n >= at_least and per_device // n <= largest)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a global batch -> global arrays, split over the devices."""
    sharding = batch_sharded(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }


def to_host(tree: Any, mesh: Mesh) -> Any:
    """The tree as whole NumPy arrays, in every process."""
    if jax.process_count() > 1:
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)
