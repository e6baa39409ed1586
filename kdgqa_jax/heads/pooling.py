"""Pooling of key/value heads: parameters of a model with more of them into those of one with fewer.

Heads are grouped contiguously, N/K per group. Key and value kernels *and biases* of a group are
pooled; query, output projection, MLP, norms, embeddings and head are kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.tree_utils import stack_layers, unstack_layers

Array = jax.Array


def _random(heads: Array, rng: Array) -> Array:
    """One head of each group, drawn at random: (..., K, G, H) -> (..., K, H)."""
    num_groups, group = heads.shape[-3:-1]
    chosen = jax.random.randint(rng, (num_groups,), 0, group)
    index = chosen.reshape((num_groups, 1, 1))
    return jnp.take_along_axis(heads, jnp.broadcast_to(index, (*heads.shape[:-2], 1, 1)), -2)[
        ..., 0, :
    ]


POOLING: dict[str, Callable[[Array, Array], Array]] = {
    "mean": lambda heads, rng: jnp.mean(heads, axis=-2),
    "first": lambda heads, rng: heads[..., 0, :],
    "random": _random,
}
"""How the heads of a group become one: (..., K, G, H) and a key -> (..., K, H).

The GQA paper (arXiv 2305.13245) measured mean > first > random.
"""


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise UserError unless key/value heads can be grouped into that many."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise UserError(
            f"{num_heads} key/value heads cannot be pooled into {num_kv_heads}: the number has to"
            f" divide {num_heads}"
        )


def pool_heads(
    x: Array, num_kv_heads: int, pooling: str = "mean", rng: Array | None = None
) -> Array:
    """Pool the head axis of a key or value kernel or bias: (..., N, H) -> (..., K, H).

    Raises UserError: K does not divide N, an unknown rule.
    """
    if pooling not in POOLING:
        raise unknown("pooling", pooling, POOLING)
    num_heads, width = x.shape[-2:]
    check_groups(num_heads, num_kv_heads)
    if num_kv_heads == num_heads:
        return x
    heads = x.reshape(*x.shape[:-2], num_kv_heads, num_heads // num_kv_heads, width)
    return POOLING[pooling](heads, jax.random.key(0) if rng is None else rng)


def to_grouped(
    params: dict[str, Any], num_kv_heads: int, pooling: str = "mean", seed: int = 0
) -> dict[str, Any]:
    """Parameters of a ViT with K key/value heads from those of one with more.

    Args:
      params: of `vit.VisionTransformer`, layers stacked or not.
      num_kv_heads: K; divides the number of key/value heads in `params`.
      pooling: a name in `POOLING`.
      seed: of "random"; key, value, kernel and bias of a layer take the same heads.

    Returns:
      `params` with key and value kernels (..., D, K, H) and biases (..., K, H).

    Raises:
      UserError: K does not divide the number of key/value heads, an unknown rule.
    """
    if "blocks" in params:
        return stack_layers(to_grouped(unstack_layers(params), num_kv_heads, pooling, seed))
    converted = dict(params)
    layer_names = [name for name in params if name.startswith("blocks_")]
    rngs = jax.random.split(jax.random.key(seed), len(layer_names))
    for name, rng in zip(layer_names, rngs, strict=True):
        attention = dict(params[name]["attn"])
        for projection in ("key", "value"):
            attention[projection] = {
                leaf: pool_heads(x, num_kv_heads, pooling, rng)
                for leaf, x in attention[projection].items()
            }
        converted[name] = {**params[name], "attn": attention}
    return converted
