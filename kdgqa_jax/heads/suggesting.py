"""How few key/value heads each layer of a model can do with."""

from typing import Any

import jax
import numpy as np

from kdgqa_jax import tree_utils, vit
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads.calibration import layer_moments
from kdgqa_jax.heads.grouping import as_equal_groups
from kdgqa_jax.heads.merging import merge_heads, not_linear
from kdgqa_jax.heads.moments import InputMoments

SUGGESTION_HEADER = ("layer", "KV heads", "keys kept, %", "values kept, %")


def check_share(share: float) -> None:
    """Raise UserError for a share of the energy that is none."""
    if not 0.0 < share <= 1.0:
        raise UserError(f"share {share} of the energy to keep must be above 0 and at most 1")


def fewest_kv_heads(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    share: float,
    images: np.ndarray | None = None,
) -> tuple[list[tuple[str, ...]], str]:
    """Per layer the fewest key/value heads whose merging by `svd` keeps a share of the energy.

    Args:
      model: any variant.
      variables: {"params": ... and, for DGQA, "norm_stats": ...}, layers stacked or not.
      share: of the energy of the layer's keys and of that of its values, in (0, 1].
      images: (n, height, width, channels) float32, normalised, that the energy is measured on;
        None: by weights and norm scales alone.

    Returns:
      A row under `SUGGESTION_HEADER` for each layer, and a sentence that sums them up. What is
        averaged, not merged (`merging.NOT_LINEAR`), has an empty cell and takes no part.

    Raises:
      UserError: a share out of range, bad images, a kind of block whose heads cannot be merged.
    """
    check_share(share)
    params, fixed = as_equal_groups(model, variables)
    params = tree_utils.unstack_layers(jax.device_get(params))
    by = "by weights and norm scales, without data"
    if images is not None:
        by = f"on {len(images)} images"
    moments = layer_moments(model, variables, images)
    averaged = not_linear(params["blocks_0"]["attn"])
    for projection, option in averaged.items():
        by += f"; {projection} heads, which {option} has averaged, are not counted"
    by += "" if fixed else ", groups taken as equal"
    have = model.attention.num_kv_heads
    fewer = [k for k in range(1, have) if have % k == 0]
    rows, enough = [], {*fewer, have}
    for i in range(model.depth):
        name = f"blocks_{i}"
        kept = {k: _kept(params[name], moments[name], k) for k in fewer}
        kept[have] = {p: 1.0 for p in ("key", "value") if p not in averaged}
        keeping = [k for k, shares in kept.items() if min(shares.values(), default=1.0) >= share]
        enough &= set(keeping)  # two groups may keep more than three, which cut elsewhere
        shares = kept[keeping[0]]
        shown = (f"{100 * shares[p]:.2f}" if p in shares else "" for p in ("key", "value"))
        rows.append((str(i), str(keeping[0]), *shown))
    return rows, f"every layer keeps {share:.4g} with {min(enough)} of {have} key/value heads, {by}"


def _kept(block: dict[str, Any], moments: InputMoments, num_kv_heads: int) -> dict[str, float]:
    """Shares of the energy of "key" and "value" heads that merging keeps, of what it merges."""
    merged = merge_heads(block["attn"], num_kv_heads, moments, layer_scale=block.get("ls1"))
    energies = {
        "key": (merged.key_energy, merged.key_lost),
        "value": (merged.value_energy, merged.value_lost),
    }
    return {
        name: 1.0 - float(lost.sum() / (energy.sum() or 1.0))
        for name, (energy, lost) in energies.items()
        if energy is not None
    }
