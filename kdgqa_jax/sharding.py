"""The mesh of devices and how arrays lie on it. One device is a mesh of one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kdgqa_jax.errors import UserError


def make_mesh() -> jax.sharding.Mesh:
    """All devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device: parameters and other state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis split over the devices: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(name: str, batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError unless a batch can be split over the devices."""
    devices = mesh.shape["data"]
    if batch_size < 1 or batch_size % devices:
        raise UserError(f"{name}={batch_size} must be a positive multiple of the {devices} devices")


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """This process's part of a global batch -> global arrays, split over the devices."""
    sharding = batch_sharded(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }
