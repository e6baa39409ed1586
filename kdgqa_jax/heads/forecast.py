"""What a conversion of heads discards, by layer, before any image goes through the whole model.

    D  model width    N  query heads    K  key/value heads    H, V  widths of heads

Taken are the arrays of a layer before and after, whatever rule made them. For a layer input of
known moments, queries and keys taken as independent, the expected squares have a closed form: of
the logits that differ, and of what one token's value adds to the output, both relative to what was
there. numpy and float64.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kdgqa_jax.heads.merging_problem import head_means
from kdgqa_jax.heads.moments import InputMoments

Layer = Mapping[str, Mapping[str, Any]]  # `merging.Attention`


def discarded(
    before: Layer,
    after: Layer,
    moments: InputMoments,
    layer_scale: np.ndarray | None = None,
) -> tuple[float, float]:
    """Shares of a layer's logits and values that are other ones after a conversion.

    Args:
      before: arrays of the layer as it was, see `merging.Attention`, in equal groups.
      after: arrays as they are, with as many query heads.
      moments: of the layer's input.
      layer_scale: (D,) factors on what the output projection gives; None: ones.

    Returns:
      (E|logits - logits'|^2 / E|logits|^2, without what is equal in a row; the same of what a
      token's value adds to the output, about its mean where the output has a bias to hold it). 0
      where there is nothing to lose. A share may be above 1: worse than zeros.
    """
    shares = []
    for side in (_logits, _values):
        ours, theirs = (side(layer, moments, layer_scale) for layer in (before, after))
        energy = _products(ours, ours)
        error = energy - 2.0 * _products(ours, theirs) + _products(theirs, theirs)
        shares.append(max(error, 0.0) / energy if energy > 0.0 else 0.0)
    return shares[0], shares[1]


class _Side(NamedTuple):
    """Products left right^T of all query heads, and both factors in the metric of the moments."""

    left: np.ndarray  # (D+1, N, width): the last row is what no token moves
    right: np.ndarray  # (D, N, width)
    seen_left: np.ndarray
    seen_right: np.ndarray


def _side(left: np.ndarray, spread: np.ndarray, mean: float, right: np.ndarray, seen: Any) -> _Side:
    """`mean`: what the last row counts."""
    seen_left = np.concatenate([np.tensordot(spread, left[:-1], 1), mean * left[-1:]])
    return _Side(left, right, seen_left, seen)


def _logits(layer: Layer, moments: InputMoments, layer_scale: np.ndarray | None) -> _Side:
    """Queries and centred keys."""
    del layer_scale
    query = _float64(layer["query"])
    left = np.concatenate([query["kernel"], head_means(query, moments)[None]])
    left = left * left.shape[2] ** -0.5
    key, heads = _float64(layer["key"])["kernel"], left.shape[1]
    right, seen = (
        np.repeat(x, heads // key.shape[1], axis=1)
        for x in (key, np.tensordot(moments.centred, key, 1))
    )
    return _side(left, moments.covariance, 1.0, right, seen)


def _values(layer: Layer, moments: InputMoments, layer_scale: np.ndarray | None) -> _Side:
    """Values and the rows that take them to the output."""
    value, rows = _float64(layer["value"]), _float64(layer["out"])["kernel"]
    left = np.concatenate([value["kernel"], head_means(value, moments)[None]])
    left = np.repeat(left, len(rows) // left.shape[1], axis=1)
    rows = rows if layer_scale is None else rows * np.asarray(layer_scale, np.float64)
    right = rows.transpose(2, 0, 1)
    return _side(left, moments.covariance, 0.0 if "bias" in layer["out"] else 1.0, right, right)


def _float64(projection: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {leaf: np.asarray(x, np.float64) for leaf, x in projection.items()}


def _products(a: _Side, b: _Side) -> float:
    """Sum over the query heads of the expected product of what both give."""
    lefts = np.einsum("dnh,dne->nhe", a.left, b.seen_left, optimize=True)
    rights = np.einsum("dnh,dne->nhe", a.right, b.seen_right, optimize=True)
    return float(np.sum(lefts * rights))


# --- what that has meant ------------------------------------------------------------------------

MEASURED: dict[str, tuple[tuple[float, int, float, float], ...]] = {
    "calibrated": (
        (0.013, 13, 0.95, 1.00),
        (0.028, 12, 0.97, 1.00),
        (0.067, 12, 0.93, 0.99),
        (0.188, 12, 0.82, 0.97),
    ),
    "without data": (
        (0.137, 10, 0.70, 0.99),
        (0.235, 10, 0.51, 0.96),
        (0.504, 10, 0.45, 0.92),
        (0.873, 10, 0.06, 0.73),
        (1.753, 10, 0.03, 0.58),
    ),
}
"""By moments -> (share up to, conversions, least and largest cosine that they kept).

Measured by examples/front.py on two models: docs/results/front_dinov2_small/front.json, its
"gate_of_all". The cosine is that of the features of a converted model, not trained afterwards, with
those of the original.
"""


def forecast(shares: Mapping[str, tuple[float, float]], calibrated: bool) -> str:
    """A sentence: the mean share discarded, and what conversions that discarded as much kept.

    Args:
      shares: by layer, of `discarded`.
      calibrated: the moments are those of images.
    """
    share = float(np.mean([list(layer) for layer in shares.values()]))
    how = "calibrated" if calibrated else "without data"
    said = f"{'under 1%' if share < 0.01 else f'{share:.0%}'} of logits and values discarded (mean"
    said += f" of the layers, {how})"
    for limit, count, least, largest in MEASURED[how]:
        if share <= limit:
            return (
                f"{said}; {count} conversions like this of two ViTs, not trained afterwards,"
                f" kept cosines of {least:.2f} to {largest:.2f} of its features"
            )
    return f"{said}, more than any measured conversion that kept its features: train afterwards"
