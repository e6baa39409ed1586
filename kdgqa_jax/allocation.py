"""Allocation: from key head norms to the key/value head that each query head uses.

Pure functions on arrays, safe under `jit` and `vmap`, without loops over data. Axis legend:

    B  batch             T  query tokens        S  key/value tokens
    N  query heads       K  key/value heads     H  width of one head

Terms: *key head norm* n[K]; *allocation* a[K], how many query heads each key/value head serves
(non-negative, sum(a) == N); *group index* g[N], the key/value head that each query head uses.
Every function works on the last axis, so that leading axes (layers, images) pass through.

Source: "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", arXiv 2408.08454,
sections on KDGQA and DGQA, and the authors' released code; docs/method.md says where they differ.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


# --- importance of a key head -------------------------------------------------------------------


def _l2(key: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(key), axis=(1, 3)))


def _variance(key: Array) -> Array:
    return jnp.sum(jnp.var(key, axis=1), axis=-1)


def _max_norm(key: Array) -> Array:
    return jnp.max(jnp.sqrt(jnp.sum(jnp.square(key), axis=-1)), axis=1)


IMPORTANCE: dict[str, Callable[[Array], Array]] = {
    "l2": _l2,  # Frobenius norm over tokens and head width (the paper, eq. for ||K_j||)
    "variance": _variance,  # variance over tokens, summed over the head width
    "max_norm": _max_norm,  # norm of the token with the largest norm
}
"""Importance of a key head by name: BSKH float32 -> (B, K) float32."""


def key_head_norms(
    key: Array, mask: Array | None = None, *, per_example: bool = False, importance: str = "l2"
) -> Array:
    """Key head norms, the scores that drive KDGQA and DGQA.

    Args:
      key: BSKH, any float dtype: the projected keys with bias, without the 1/sqrt(H) scale.
      mask: (B,) bool, False for the padded images, which never count. None: all images are real.
      per_example: return the norms of each image instead of their mean over the real images.
      importance: "l2" (default), "variance" or "max_norm"; see `IMPORTANCE`.

    Returns:
      (K,) float32, or (B, K) with `per_example`. They carry no gradient.

    Raises:
      ValueError: `key` is not BSKH, `mask` not (B,), `importance` not a function of the keys.
    """
    if key.ndim != 4:
        raise ValueError(f"key must have the axes BSKH, got shape {key.shape}")
    if importance not in IMPORTANCE:
        raise ValueError(
            f"importance {importance!r} is not a function of the keys; use one of"
            f" {list(IMPORTANCE)}"
        )
    norms = IMPORTANCE[importance](jax.lax.stop_gradient(key).astype(jnp.float32))  # BK
    if per_example:
        return norms
    if mask is None:
        return jnp.mean(norms, axis=0)
    if mask.shape != key.shape[:1]:
        raise ValueError(f"mask must have the shape (B,) = {key.shape[:1]}, got {mask.shape}")
    valid = mask.astype(bool)
    total = jnp.sum(jnp.where(valid[:, None], norms, 0.0), axis=0)
    return total / jnp.maximum(jnp.sum(valid), 1).astype(total.dtype)


# --- scores -> allocation -----------------------------------------------------------------------


def equal_allocation(num_heads: int, num_kv_heads: int) -> Array:
    """The allocation of `gqa`: (K,) int32, N // K each and the remainder to the first heads."""
    share, remainder = divmod(num_heads, num_kv_heads)
    return share + (jnp.arange(num_kv_heads) < remainder).astype(jnp.int32)


def repair(allocation: Array, num_heads: int) -> Array:
    """The published repair: make an allocation that rounding has put off add up to N.

    While the sum is too large take one from the largest (the first one on a tie); while it is too
    small give one to the smallest (the first one on a tie). This is the closed form of those loops:
    list every unit (k, v) with v = 1..N as filled (v <= a[k]) or empty; taking removes the first
    filled units in the order of v descending then k ascending, giving fills the first empty ones in
    the order of v ascending then k ascending.

    Args:
      allocation: (..., K) integers in 0..N.
      num_heads: N.

    Returns:
      (..., K) int32 with sum N.
    """
    a = allocation.astype(jnp.int32)[..., :, None]  # (..., K, 1)
    excess = jnp.sum(a, axis=-2, keepdims=True) - num_heads  # (..., 1, 1)
    v = jnp.arange(1, num_heads + 1, dtype=jnp.int32)
    v = jnp.expand_dims(v, range(a.ndim - 1))  # (..., 1, V)
    filled = v <= a  # (..., K, V)

    def first(units: Array, units_before: Array, count: Array) -> Array:
        """The first `count` of `units`, where `units_before` come from the levels before v."""
        units_till_here = jnp.cumsum(units, axis=-2, dtype=jnp.int32)
        same_level_before = units_till_here - units.astype(jnp.int32)
        return units & (units_before + same_level_before < count)

    above = jnp.sum(jnp.maximum(a - v, 0), axis=-2, keepdims=True)
    below = jnp.sum(jnp.maximum(v - 1 - a, 0), axis=-2, keepdims=True)
    taken = first(filled, above, excess)
    given = first(~filled, below, -excess)
    return (
        a[..., 0]
        + jnp.sum(given, axis=-1, dtype=jnp.int32)
        - jnp.sum(taken, axis=-1, dtype=jnp.int32)
    )


def _finish(allocation: Array, usable: Array, num_heads: int, min_heads_per_group: int) -> Array:
    """Lift to the minimum, repair, and fall back to the equal allocation where not `usable`."""
    num_kv_heads = allocation.shape[-1]
    if not 0 <= min_heads_per_group * num_kv_heads <= num_heads:
        raise ValueError(
            f"min_heads_per_group={min_heads_per_group} for {num_kv_heads} key/value heads needs"
            f" {min_heads_per_group * num_kv_heads} query heads, but there are {num_heads}"
        )
    allocation = repair(jnp.maximum(allocation, min_heads_per_group), num_heads)
    equal = jnp.broadcast_to(equal_allocation(num_heads, num_kv_heads), allocation.shape)
    return jnp.where(usable, allocation, equal)


def _quotas(weights: Array, num_heads: int) -> tuple[Array, Array]:
    """Each weight's exact share of N (..., K), and whether the weights can be shared by (..., 1).

    Shares are zero where they cannot: a zero or non-finite sum, or a negative weight.
    """
    total = jnp.sum(weights, axis=-1, keepdims=True)
    non_negative = jnp.all(weights >= 0, axis=-1, keepdims=True)  # also False for a NaN
    usable = jnp.isfinite(total) & (total > 0) & non_negative
    quotas = jnp.where(usable, weights / jnp.where(usable, total, 1.0) * num_heads, 0.0)
    # A compiler may compute a value again for each of its uses, with another rounding. Shares are
    # made once: floors, fractions and sums of one allocation must come from the same numbers.
    return jax.lax.optimization_barrier((quotas, usable))


def kdgqa_allocation(norms: Array, num_heads: int, min_heads_per_group: int = 0) -> Array:
    """KDGQA: min-max scaled norms, rounded shares, published repair (paper, section on KDGQA).

    s = (n - min n) / (max n - min n);  a = round_half_even(s / sum(s) * N);  then `repair`.
    The head with the smallest norm starts at zero, so heads that serve no query head are common;
    `min_heads_per_group=1` forbids them.

    Args:
      norms: (..., K) float.
      num_heads: N.
      min_heads_per_group: the least number of query heads of each key/value head.

    Returns:
      (..., K) int32 with sum N. Degenerate norms (K == 1, all equal, any that is not finite) give
      the equal allocation.

    Raises:
      ValueError: `min_heads_per_group` times K exceeds N.
    """
    norms = norms.astype(jnp.float32)
    low, high = (f(norms, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    spread = high - low
    # Not below zero: under jit the minimum and the norms may be rounded differently (see _quotas).
    scores = jnp.maximum(norms - low, 0.0) / jnp.where(spread > 0, spread, 1.0)
    quotas, usable = _quotas(scores, num_heads)
    rounded = jnp.round(quotas).astype(jnp.int32)
    return _finish(rounded, usable, num_heads, min_heads_per_group)


def apportion(weights: Array, num_heads: int, min_heads_per_group: int = 0) -> Array:
    """Largest remainder apportionment of N query heads by weight, as DGQA uses it.

    floor(w / sum(w) * N), then one more to the largest fractional parts, first index on a tie.

    Args:
      weights: (..., K) float, non-negative.
      num_heads: N.
      min_heads_per_group: the least number of query heads of each key/value head; what it takes
        comes from the largest heads, as in `repair`.

    Returns:
      (..., K) int32 with sum N; the equal allocation for a zero or non-finite sum.

    Raises:
      ValueError: `min_heads_per_group` times K exceeds N.
    """
    quotas, usable = _quotas(weights.astype(jnp.float32), num_heads)
    floors = jnp.floor(quotas)
    fractions = quotas - floors
    mine, other = fractions[..., :, None], fractions[..., None, :]
    index = jnp.arange(weights.shape[-1])
    earlier = jnp.expand_dims(index[None, :] < index[:, None], range(mine.ndim - 2))
    goes_before = (other > mine) | ((other == mine) & earlier)
    rank = jnp.sum(goes_before, axis=-1)
    floors = floors.astype(jnp.int32)
    seats_left = num_heads - jnp.sum(floors, axis=-1, keepdims=True)
    allocation = floors + (rank < seats_left).astype(jnp.int32)
    return _finish(allocation, usable, num_heads, min_heads_per_group)


def _remember(new: Array, cache: Array) -> Array:
    """The new cache, or the old one where any entry of the new one is not finite."""
    return jnp.where(jnp.all(jnp.isfinite(new), axis=-1, keepdims=True), new, cache)


def dgqa_ema_allocation(
    norms: Array, cache: Array, num_heads: int, beta: float = 0.9, min_heads_per_group: int = 0
) -> tuple[Array, Array]:
    """DGQA with an exponential moving average: m <- beta*n + (1-beta)*m; a = apportion(m).

    Args:
      norms: (..., K) float, of the current batch.
      cache: (..., K) float32, the average so far (zeros at the start).
      num_heads: N.
      beta: weight of the *current* norms, as released.
      min_heads_per_group: as in `apportion`.

    Returns:
      (allocation (..., K) int32, new cache (..., K) float32). Norms that are not finite give the
      equal allocation and leave the cache as it was.
    """
    average = beta * norms.astype(jnp.float32) + (1.0 - beta) * cache
    return apportion(average, num_heads, min_heads_per_group), _remember(average, cache)


def dgqa_diff_allocation(
    norms: Array, cache: Array, num_heads: int, min_heads_per_group: int = 0
) -> tuple[Array, Array]:
    """DGQA with the difference rule: d = abs(n - m), m <- n; a = apportion(d).

    Args and returns are those of `dgqa_ema_allocation`, without `beta`; the cache holds the norms
    of the last update.
    """
    norms = norms.astype(jnp.float32)
    change = jnp.abs(norms - cache)
    return apportion(change, num_heads, min_heads_per_group), _remember(norms, cache)


# --- allocation -> group index ------------------------------------------------------------------


def group_index(allocation: Array, num_heads: int) -> Array:
    """The key/value head of each query head, served in order: repeat(arange(K), a).

    Args:
      allocation: (..., K) int with sum N.
      num_heads: N, static, so that the shape is the same for every allocation.

    Returns:
      (..., N) int32 in 0..K-1, non-decreasing.
    """
    ends = jnp.cumsum(allocation, axis=-1, dtype=jnp.int32)[..., None, :]  # (..., 1, K)
    heads = jnp.arange(num_heads, dtype=jnp.int32)[:, None]
    heads = jnp.expand_dims(heads, range(ends.ndim - 2))  # (..., N, 1)
    return jnp.sum(ends <= heads, axis=-1, dtype=jnp.int32)


def assignment_mask(allocation: Array, num_heads: int) -> Array:
    """The group index as a mask: (..., N, K) bool with one True per row."""
    index = group_index(allocation, num_heads)[..., None]
    key_heads = jnp.arange(allocation.shape[-1], dtype=index.dtype)
    return index == jnp.expand_dims(key_heads, range(index.ndim - 1))
