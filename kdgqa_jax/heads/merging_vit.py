"""Merging, and making narrower, of key/value heads in all layers of a ViT."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.heads.merging import Merged, merge_heads
from kdgqa_jax.heads.moments import InputMoments, data_free_by_layer
from kdgqa_jax.tree_utils import stack_layers, unstack_layers


def one_per_query_head(params: dict[str, Any], allocations: Sequence[np.ndarray]) -> dict[str, Any]:
    """Parameters with each key/value head once for every query head that it serves.

    The equal groups that merging goes by are then those of the model, whatever its allocation.

    Args:
      params: of `vit.VisionTransformer` with K key/value heads, layers stacked or not.
      allocations: of every layer, (K,) int.

    Returns:
      `params` with N key/value heads.
    """
    if "blocks" in params:
        return stack_layers(one_per_query_head(unstack_layers(params), allocations))
    params = dict(params)
    for i, allocation in enumerate(allocations):
        block = params[f"blocks_{i}"]
        repeated = {
            projection: {
                leaf: np.repeat(np.asarray(x), allocation, axis=-2)
                for leaf, x in block["attn"][projection].items()
            }
            for projection in ("key", "value")
        }
        params[f"blocks_{i}"] = {**block, "attn": {**block["attn"], **repeated}}
    return params


def to_merged(
    params: dict[str, Any],
    num_kv_heads: int,
    moments: Mapping[str, InputMoments] | None = None,
    rule: str = "svd",
    *,
    head_width: int | None = None,
    v_head_width: int | None = None,
) -> tuple[dict[str, Any], dict[str, Merged]]:
    """Parameters of a ViT with K key/value heads from those of one with more, or wider ones.

    Args:
      params: of `vit.VisionTransformer`, layers stacked or not.
      num_kv_heads: K; divides the number of key/value heads in `params`.
      moments: of the input of every layer by name ("blocks_0", ...), as
        `calibration.gather_moments` gives them; None: `data_free_by_layer`.
      rule: a name in `MERGING`.
      head_width: H of queries and keys; None: as it is.
      v_head_width: V of values; None: as it is.

    Returns:
      `params` with key kernels (..., D, K, H) and biases (..., K, H), those of values with V,
      queries and output adapted, dtypes kept; and what merging made of each layer, by name, in
      those dtypes.

    Raises:
      UserError: as `merge_heads`.
    """
    widths = {"head_width": head_width, "v_head_width": v_head_width}
    if "blocks" in params:
        params = unstack_layers(params)
        converted, merged = to_merged(params, num_kv_heads, moments, rule, **widths)
        return stack_layers(converted), merged
    converted, merged = dict(params), {}
    moments = data_free_by_layer(params) if moments is None else moments
    for name in (name for name in params if name.startswith("blocks_")):
        old, scale = params[name]["attn"], params[name].get("ls1")
        merged[name] = merge_heads(old, num_kv_heads, moments[name], rule, scale, **widths)
        attention = {
            projection: {leaf: x.astype(old[projection][leaf].dtype) for leaf, x in leaves.items()}
            for projection, leaves in merged[name].attention.items()
        }
        merged[name] = dataclasses.replace(merged[name], attention=attention)
        converted[name] = {**params[name], "attn": {**old, **attention}}
    return converted, merged
