"""Attention by cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

Equal groups are native there. With a group index key/value heads are expanded to query heads just
before the call, by a product, whose gradient has a fixed order of summation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend

from kdgqa_jax import sharding
from kdgqa_jax.kernels.mesh import on_each_device
from kdgqa_jax.kernels.xla import expand_heads

Array = jax.Array

TILE = 64
"""Tokens are filled up to a multiple of this. The backward pass of some versions of cuDNN gives NaN
for other numbers of tokens without a padding mask (NVIDIA/cudnn-frontend, issue 160)."""


def refusal(
    query: Array, key: Array, value: Array, group_index: Array | None, mask: Array | None
) -> str | None:
    """See `Implementation`."""
    del group_index
    platform, width = sharding.platform(), query.shape[3]
    if platform != "gpu" or "cuda" not in backend.get_backend().platform_version:
        return f"it is for NVIDIA GPUs, and this program is for the platform {platform!r}"
    if mask is not None:
        return "it takes no mask"
    for x in (query, key, value):
        if x.dtype.name not in ("bfloat16", "float16"):
            return f"it takes bfloat16 and float16, and not {x.dtype.name}"
    if value.shape[3] != width:
        return f"it takes values as wide as keys, and not {value.shape[3]} and {width}"
    if width % 8 or width > 128:
        return f"its head width must be a multiple of 8 up to 128, and not {width}"
    return None


def attention(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None = None,
    mask: None = None,
) -> Array:
    """As `grouped_attention` says, of arguments that `refusal` accepts."""
    del mask
    # Of the forward pass what cuDNN returns is kept. Expanded and filled up arrays are made again.
    attend = jax.checkpoint(_attend, policy=_is_cudnn, prevent_cse=False)
    return on_each_device(attend, query, key, value, group_index)


def _is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    return "dot_product_attention" in primitive.name


def _attend(query: Array, key: Array, value: Array, group_index: Array | None) -> Array:
    if group_index is not None:
        key, value = (expand_heads(x, group_index, "one_hot") for x in (key, value))
    batch, length, tokens = query.shape[0], query.shape[1], key.shape[1]
    lengths: dict[str, Array] = {}
    if length % TILE or tokens % TILE:
        lengths["query_seq_lengths"] = jnp.full((batch,), length, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full((batch,), tokens, jnp.int32)
    out = jax.nn.dot_product_attention(
        *(_filled(x) for x in (query, key, value)), implementation="cudnn", **lengths
    )
    return out[:, :length]


def _filled(x: Array) -> Array:
    """Zeros after the last token."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0)))
