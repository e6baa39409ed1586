"""What a conversion of heads discards, by layer, before any image goes through the whole model.

    D  model width    N  query heads    K  key/value heads    H, V  widths of heads

Taken are the arrays of a layer before and after, whatever rule made them. For a layer input of
known moments, queries and keys taken as independent, the expected squares have a closed form: of
the logits that differ, and of what one token's value adds to the output, both relative to what was
there. numpy and float64.
"""

from collections.abc import Mapping
from typing import Any

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
    for sides in (_logits, _values):
        ours, theirs = (sides(layer, moments, layer_scale) for layer in (before, after))
        energy = _products(ours, ours)
        error = energy - 2.0 * _products(ours, theirs) + _products(theirs, theirs)
        shares.append(max(error, 0.0) / energy if energy > 0.0 else 0.0)
    return shares[0], shares[1]


def _by_query_head(layer: Layer, name: str, leaf: str) -> np.ndarray:
    """Arrays of a projection in float64, key/value heads once for every query head."""
    x = np.asarray(layer[name][leaf], np.float64)
    heads = layer["query"]["kernel"].shape[1]
    return np.repeat(x, heads // x.shape[-2], axis=-2)


def _logits(layer: Layer, moments: InputMoments, layer_scale: Any) -> tuple[np.ndarray, ...]:
    """(left (D+1,N,H), right (D,N,H), moment of the one, of the other) of products left right^T."""
    del layer_scale
    query = np.asarray(layer["query"]["kernel"], np.float64)
    means = head_means({n: np.asarray(x, np.float64) for n, x in layer["query"].items()}, moments)
    left = np.concatenate([query, means[None]]) * query.shape[2] ** -0.5
    spread = np.pad(moments.covariance, (0, 1))
    spread[-1, -1] = 1.0  # the mean query counts as it is
    return left, _by_query_head(layer, "key", "kernel"), spread, moments.centred


def _values(layer: Layer, moments: InputMoments, layer_scale: Any) -> tuple[np.ndarray, ...]:
    """(left (D+1,N,V), right (D,N,V), moment, None: the identity)."""
    rows = np.asarray(layer["out"]["kernel"], np.float64)
    rows = rows if layer_scale is None else rows * np.asarray(layer_scale, np.float64)
    value = _by_query_head(layer, "value", "kernel")
    bias = _by_query_head(layer, "value", "bias") if "bias" in layer["value"] else None
    means = head_means({"kernel": value} | ({} if bias is None else {"bias": bias}), moments)
    spread = np.pad(moments.covariance, (0, 1))
    spread[-1, -1] = 0.0 if "bias" in layer["out"] else 1.0
    return np.concatenate([value, means[None]]), rows.transpose(2, 0, 1), spread, None


def _products(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> float:
    """Sum over the query heads of tr(left_a^T S left_b right_b^T C right_a)."""
    left, right, spread, centred = a
    others = b[1] if centred is None else np.tensordot(centred, b[1], 1)
    lefts = np.einsum("dnh,dne->nhe", left, np.tensordot(spread, b[0], 1), optimize=True)
    rights = np.einsum("dnh,dne->nhe", right, others, optimize=True)
    return float(np.sum(lefts * rights))
