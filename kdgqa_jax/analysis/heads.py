"""How alike attention heads are: pure functions on arrays, for any number of leading axes.

    L  layers          N  query heads    T  query tokens
    V  width of values K  key/value heads    S  key/value tokens

Heads are compared by the cosine of what they computed, maps (..., N, T, S) or outputs
(..., N, T, V), each head flattened to one vector. Heads that share a key/value head are *within* a
group; *between* groups are pairs that do not. All rows of a map sum to one, so that cosines of maps
are never negative, and near 1 where heads attend to everything alike; those of outputs can be
anything from -1 to 1.

Source: the analysis of groups and of PGQA in "Beyond Uniform Query Distribution: Key-Driven Grouped
Query Attention", arXiv 2408.08454; docs/analysis.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax.kernels import expand_heads
from kdgqa_jax.noise import Noise, perturb_maps, perturb_output

Array = jax.Array


@flax.struct.dataclass
class Similarity:
    """Cosines of heads with each other; NaN where there is no such pair.

    `mha` has no pairs within a group, one key/value head none between groups.
    """

    cosine: Array  # (..., N, N) float32
    within: Array  # (...) float32: the mean over pairs of different heads of one group
    between: Array  # (...) float32: the mean over pairs of heads of different groups


def _unit(heads: Array) -> Array:
    """(..., N, T, X) -> (..., N, T X) of length 1; a head that is all zero stays zero."""
    flat = heads.reshape(*heads.shape[:-2], -1).astype(jnp.float32)
    norm = jnp.linalg.norm(flat, axis=-1, keepdims=True)
    return flat / jnp.where(norm == 0, 1.0, norm)


def similarity(heads: Array, group_index: Array) -> Similarity:
    """Cosines of the heads of a layer, or of many.

    Args:
      heads: (..., N, T, X) float: attention maps, or outputs with the axis of heads before that of
        tokens.
      group_index: (..., N) int: the key/value head of each query head; leading axes of 1 serve all.

    Raises:
      ValueError: shapes that do not fit together.
    """
    count = heads.shape[-3] if heads.ndim > 2 else 0
    if not count or group_index.shape[-1] != count:
        raise ValueError(
            f"heads (..., N, T, X) and group_index (..., N) do not fit together: {heads.shape},"
            f" {group_index.shape}"
        )
    unit = _unit(heads)
    cosine = jnp.einsum("...ip,...jp->...ij", unit, unit, precision="highest")
    alike = group_index[..., :, None] == group_index[..., None, :]
    different = ~jnp.eye(count, dtype=bool)

    def mean(pairs: Array) -> Array:
        pairs = jnp.broadcast_to(pairs, cosine.shape)
        return jnp.sum(jnp.where(pairs, cosine, 0.0), (-2, -1)) / jnp.sum(pairs, (-2, -1))

    return Similarity(cosine, mean(alike & different), mean(~alike))


def self_similarity(before: Array, after: Array) -> Array:
    """Cosine of each head with itself before and after something, such as PGQA's noise.

    Args:
      before: (..., N, T, X) float.
      after: of the same shape.

    Returns:
      (..., N) float32.

    Raises:
      ValueError: other shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"before {before.shape} and after {after.shape} must have one shape")
    return jnp.sum(_unit(before) * _unit(after), axis=-1)


def perturbed(
    rng: Array,
    maps: Array,
    values: Array,
    group_index: Array,
    noise: Noise,
    scale: Array | float | None = None,
) -> tuple[Array, Array]:
    """Maps and outputs of one layer after PGQA's noise has been subtracted.

    The noise is drawn for these arrays alone: what it would do to layers before is left out.

    Args:
      rng: key of the draw; one for the whole batch, as in training.
      maps: BNTS, without noise.
      values: BSKV.
      group_index: (N,) or (B, N) int.
      noise: what is subtracted from what.
      scale: takes the place of that of the noise; may be traced.

    Returns:
      maps BNTS and outputs BTNV, float32. With `noise_target` "output" maps are as they were.
    """
    maps = maps.astype(jnp.float32)
    scale = noise.noise_scale if scale is None else scale
    arguments = (scale, noise.noise_distribution, noise.noise_statistics)
    if noise.noise_target == "maps":
        maps = perturb_maps(rng, maps, *arguments)
    expanded = expand_heads(values.astype(jnp.float32), group_index)  # BSNV
    outputs = jnp.einsum("BNTS,BSNV->BTNV", maps, expanded, precision="highest")
    if noise.noise_target == "output":
        outputs = perturb_output(rng, outputs, *arguments)
    return maps, outputs


def over_training(
    records: Sequence[Mapping[str, Any]], field: str
) -> tuple[np.ndarray, np.ndarray]:
    """What a run has logged by layer: steps (n,) int and values (n, L, ...) float64.

    Args:
      records: of metrics.jsonl; those without the field are left out, as is the test split.
      field: "allocation" or "key_norm" (L, K), "idle_kv_heads" or "allocation_changes" (L,).
    """
    chosen = [r for r in records if field in r and r.get("split", "train") == "train"]
    steps = np.array([r["step"] for r in chosen], int)
    return steps, np.array([r[field] for r in chosen], np.float64)  # None, not finite, is NaN
