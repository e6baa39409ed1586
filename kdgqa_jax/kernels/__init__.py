"""Grouped attention as a pure function of query, key, value and group index, and its kernels.

    B  batch             T  query tokens        S  key/value tokens (S == T in self-attention)
    N  query heads       K  key/value heads
    H  width of one query or key head           V  width of one value head, which may be another

`IMPLEMENTATIONS` is the table: each row is one function for the whole of attention. A new kernel is
one file and one row; `PREFERRED` says where it is used without being asked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from kdgqa_jax import sharding
from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.kernels import chunked, cudnn, pallas, xla
from kdgqa_jax.kernels.xla import EXPANSIONS, expand_heads

__all__ = ["EXPANSIONS", "IMPLEMENTATIONS", "PREFERRED", "expand_heads", "grouped_attention"]

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
      attention: (query BTNH, key BSKH, value BSKV, group_index (N,) or (B, N) or None, mask or
        None) -> BTNV in the dtype of value, differentiable in the first three.
      refusal: why it cannot serve these arguments on this platform, as the end of a sentence; None
        where it can.
    """

    attention: Callable[..., Any]
    refusal: Callable[..., str | None] = lambda *arguments: None


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(xla.attention),  # the reference; the only one that makes maps
    "chunked": Implementation(chunked.attention),  # memory linear in the number of tokens
    "cudnn": Implementation(cudnn.attention, cudnn.refusal),  # NVIDIA GPUs
    "pallas": Implementation(pallas.attention, pallas.refusal),  # TPUs: no head is expanded
}
"""By name. All give the same numbers but for rounding."""

SHORT = 64
"""Tokens below which the TPU kernel has too little to do for each image."""

LONG = 2048
"""Tokens from which on maps in memory cost more than computing them twice."""

PREFERRED: dict[str, tuple[tuple[str, int], ...]] = {
    "cpu": (("chunked", LONG),),
    "gpu": (("cudnn", 0), ("chunked", LONG)),
    "tpu": (("pallas", SHORT), ("chunked", LONG)),
}
"""Platform -> (implementation, from how many key/value tokens S on), the first that serves counts.

Where none does, and on platforms that are not listed, it is `xla`. docs/speed.md has the figures.
"""


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
    expansion: str | None = None,
    return_maps: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention in which query head n uses key/value head group_index[n].

    Differentiable in query, key and value, in reverse mode; with maps in forward mode, too, and
    with `xla` and `chunked` forward over reverse.
    Scores and softmax are float32 whatever the input dtype. All shapes are static: one compilation
    serves every group index. Attention maps are made only for `return_maps`, `transform_maps` and
    dropout.

    Args:
      query: BTNH.
      key: BSKH.
      value: BSKV.
      group_index: (N,) or (B, N) int; None: the equal grouping, which takes a static path without
        any expansion (K must divide N).
      mask: bool, broadcastable to BNTS, False where a token must not be attended to. A row without
        any True attends to all tokens equally.
      dropout_rate: rate of dropout on the attention maps.
      dropout_rng: key for it; needed where the rate is not zero.
      transform_maps: applied to the maps BNTS between softmax and dropout (PGQA's noise).
      implementation: a name in `IMPLEMENTATIONS`; None: by platform, arguments and number of
        tokens, see `PREFERRED`. Maps are made by `xla`: `return_maps` uses it whatever is asked
        for, `transform_maps` and dropout refuse another one.
      expansion: how `xla` expands key/value heads, a name in `EXPANSIONS`; None: that of the
        platform. Without an implementation it asks for `xla`.
      return_maps: also return the maps as they were used, BNTS in the dtype of `value`.

    Returns:
      BTNV in the dtype of `value`, or (BTNV, BNTS) with `return_maps`.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation or expansion, an
        implementation that cannot serve, dropout without key.
    """
    _check_shapes(query, key, value, group_index)
    arguments = (query, key, value, group_index, mask)
    changes_maps = transform_maps is not None or dropout_rate > 0.0
    name = _implementation(implementation, expansion, changes_maps, return_maps, key, arguments)
    if name != "xla":
        return IMPLEMENTATIONS[name].attention(*arguments)
    return xla.attention(
        *arguments,
        expansion=expansion,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        transform_maps=transform_maps,
        return_maps=return_maps,
    )


def _implementation(
    asked: str | None,
    expansion: str | None,
    changes_maps: bool,
    return_maps: bool,
    key: Array,
    arguments: tuple[Array | None, ...],
) -> str:
    """The name of the implementation that serves, or UserError."""
    if expansion is not None and expansion not in EXPANSIONS:
        raise unknown("expansion", expansion, EXPANSIONS)
    if asked is not None and asked not in IMPLEMENTATIONS:
        raise unknown("implementation", asked, IMPLEMENTATIONS)
    if asked in (None, "xla"):
        makes_maps = changes_maps or return_maps
        return "xla" if asked or makes_maps or expansion else _preferred(key, arguments)
    if changes_maps:
        why = "it makes no attention maps, which dropout and noise on them need"
    elif expansion is not None:
        why = f"expansion={expansion!r} is an option of 'xla' alone"
    elif return_maps:  # whoever looks at them needs them in memory
        return "xla"
    else:
        why = IMPLEMENTATIONS[asked].refusal(*arguments) or ""
    if why:
        raise UserError(
            f"attention implementation {asked!r} cannot serve here: {why}; take 'xla', or leave the"
            " choice out"
        )
    return asked


def _preferred(key: Array, arguments: tuple[Array | None, ...]) -> str:
    tokens = key.shape[1]
    for name, least in PREFERRED.get(sharding.platform(), ()):
        if tokens >= least and IMPLEMENTATIONS[name].refusal(*arguments) is None:
            return name
    return "xla"


def _check_shapes(query: Array, key: Array, value: Array, group_index: Array | None) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"expected query BTNH, key BSKH and value BSKV, got {shapes}")
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
