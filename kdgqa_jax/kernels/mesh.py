"""Kernels on a mesh of devices: the partitioner does not look into them, so each gets its part."""

from collections.abc import Callable
from typing import Any

import jax

from kdgqa_jax import sharding

Array = jax.Array


def on_each_device(
    attention: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None,
) -> Array:
    """`attention` of the arguments, each device of the mesh at hand computing its part.

    The batch is split over `data` and `fsdp`, query heads over `model`, each where it divides. Any
    query head may ask for any key/value head, so a device has all of them, but in equal groups.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not sharding.is_automatic(mesh):
        return attention(query, key, value, group_index)
    batch: Any = ("data", "fsdp")
    if query.shape[0] % sharding.batch_devices(mesh):
        batch = None
    heads = "model" if query.shape[2] % mesh.shape["model"] == 0 else None
    kv_heads, index = None, jax.P()
    if group_index is None:
        heads = kv_heads = heads if key.shape[2] % mesh.shape["model"] == 0 else None
    else:
        index = jax.P(heads) if group_index.ndim == 1 else jax.P(batch, heads)
    queries, keys = jax.P(batch, None, heads), jax.P(batch, None, kv_heads)
    specs = (queries, keys, keys, index)
    attend = jax.shard_map(attention, in_specs=specs, out_specs=queries, check_vma=False)
    return attend(query, key, value, group_index)
