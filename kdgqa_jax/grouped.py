"""Grouped attention as a pure function of query, key, value and group index.

    B  batch             T  query tokens        S  key/value tokens (S == T in self-attention)
    N  query heads       K  key/value heads     H  width of one head
    G  query heads per key/value head in the equal grouping (N/K)

Residuals of the backward pass hold K key/value heads; the expansion to N heads exists only inside
an operation and is made again where the backward pass needs it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kdgqa_jax.errors import unknown

Array = jax.Array


def _gather(x: Array, group_index: Array) -> Array:
    if group_index.ndim == 1:
        return jnp.take(x, group_index, axis=2, mode="clip")
    return jnp.take_along_axis(x, group_index[:, None, :, None], axis=2, mode="clip")


def _one_hot(x: Array, group_index: Array) -> Array:
    one_hot = jax.nn.one_hot(group_index, x.shape[2], dtype=x.dtype)  # the assignment mask
    equation = "BSKH,NK->BSNH" if group_index.ndim == 1 else "BSKH,BNK->BSNH"
    return jnp.einsum(equation, x, one_hot, precision=jax.lax.Precision.HIGHEST)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array], Array]] = {
    "gather": _gather,
    "one_hot": _one_hot,
}
"""How key/value heads are expanded to query heads: (BSKH, group index) -> BSNH."""


def expand_heads(x: Array, group_index: Array, implementation: str | None = None) -> Array:
    """Key/value heads for every query head: BSKH and (N,) or (B, N) int -> BSNH.

    `implementation` is a name in `IMPLEMENTATIONS`: a gather by the group index, or a contraction
    with the assignment mask. Both give the same numbers. None takes the contraction: it feeds a
    TPU's matrix unit, its gradient has a fixed order of summation on GPUs (that of the gather has
    not), and on CPUs it was measured to need less memory at about the same speed (docs/method.md).
    """
    implementation = implementation or "one_hot"
    if implementation not in IMPLEMENTATIONS:
        raise unknown("attention implementation", implementation, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[implementation](x, group_index)


def _check_shapes(query: Array, key: Array, value: Array, group_index: Array | None) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(f"expected query BTNH and key, value BSKH of one shape, got {shapes}")
    batch, _, num_heads, width = query.shape
    if (key.shape[0], key.shape[3]) != (batch, width):
        raise ValueError(f"query and key must agree in batch B and head width H, got {shapes}")
    if group_index is None:
        if num_heads % key.shape[2]:
            raise ValueError(f"equal groups need K to divide N; give a group_index for {shapes}")
    elif group_index.shape not in ((num_heads,), (batch, num_heads)):
        raise ValueError(
            f"group_index must be (N,) = ({num_heads},) or (B, N) = ({batch}, {num_heads}),"
            f" got {group_index.shape} for {shapes}"
        )


def _scores(
    query: Array, key: Array, group_index: Array | None, implementation: str | None
) -> Array:
    """query . key in float32: BNTS."""
    accumulate = {"preferred_element_type": jnp.float32}
    if group_index is not None:

        @jax.checkpoint  # keeps K heads: the expansion is made again in the backward pass
        def dynamic(query, key):
            key = expand_heads(key, group_index, implementation)
            return jnp.einsum("BTNH,BSNH->BNTS", query, key, **accumulate)

        return dynamic(query, key)
    batch, length, num_heads, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, **accumulate)
    return scores.reshape(batch, num_heads, length, key.shape[1])


def _mix(maps: Array, value: Array, group_index: Array | None, implementation: str | None) -> Array:
    """The values weighted by the maps: BTNH."""
    if group_index is not None:

        @jax.checkpoint
        def dynamic(maps, value):
            value = expand_heads(value, group_index, implementation)
            return jnp.einsum("BNTS,BSNH->BTNH", maps, value)

        return dynamic(maps, value)
    batch, num_heads, length, source = maps.shape
    maps = maps.reshape(batch, value.shape[2], -1, length, source)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", maps, value)
    return out.reshape(batch, length, num_heads, -1)


def grouped_attention(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None = None,
    *,
    mask: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    transform_maps: Callable[[Array], Array] | None = None,
    implementation: str | None = None,
    return_maps: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention in which query head n uses key/value head group_index[n].

    Differentiable in query, key and value. Scores and softmax are float32 whatever the input dtype.
    All shapes are static: one compilation serves every group index.

    Args:
      query: BTNH.
      key: BSKH.
      value: BSKH.
      group_index: (N,) or (B, N) int; None: the equal grouping, which takes a static path without
        any expansion (K must divide N).
      mask: bool, broadcastable to BNTS, False where a token must not be attended to. A row without
        any True attends to all tokens equally.
      dropout_rate: rate of dropout on the attention maps.
      dropout_rng: key for it; needed where the rate is not zero.
      transform_maps: applied to the maps BNTS between softmax and dropout (PGQA's noise).
      implementation: see `expand_heads`.
      return_maps: also return the maps as they were used, BNTS in the dtype of `value`.

    Returns:
      BTNH in the dtype of `value`, or (BTNH, BNTS) with `return_maps`.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation, dropout without key.
    """
    _check_shapes(query, key, value, group_index)
    scores = _scores(query, key, group_index, implementation) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    maps = jax.nn.softmax(scores, axis=-1)
    if transform_maps is not None:
        maps = transform_maps(maps)
    if dropout_rate > 0.0:
        if dropout_rng is None:
            raise ValueError("dropout_rate > 0 needs a dropout_rng")
        kept = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, maps.shape)
        maps = jnp.where(kept, maps / (1.0 - dropout_rate), 0.0)
    maps = maps.astype(value.dtype)
    out = _mix(maps, value, group_index, implementation)
    return (out, maps) if return_maps else out
