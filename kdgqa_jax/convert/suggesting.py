"""How few key/value heads each layer of a model can do with."""

import os
from typing import Any

import jax
import numpy as np

from kdgqa_jax import checkpoint, layers
from kdgqa_jax.convert.calibration import gather_moments
from kdgqa_jax.convert.calibration_images import CalibrationImages
from kdgqa_jax.convert.merging import Attention, merge_heads
from kdgqa_jax.convert.moments import InputMoments, data_free_moments
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.errors import UserError

SUGGESTION_HEADER = ("layer", "KV heads", "keys kept, %", "values kept, %")


def suggest_kv_heads(
    directory: str | os.PathLike, share: float, calibration: CalibrationImages | None = None
) -> tuple[list[tuple[str, ...]], str]:
    """Per layer the fewest key/value heads whose merging by `svd` keeps a share of the energy.

    Args:
      directory: a model directory.
      share: of the energy of the layer's keys and of that of its values, in (0, 1].
      calibration: images that the energy is measured on; None: by weights and norm scales alone.

    Returns:
      A row under `SUGGESTION_HEADER` for each layer, and a sentence that sums them up.

    Raises:
      UserError: no model there, a share out of range, bad calibration images.
    """
    if not 0.0 < share <= 1.0:
        raise UserError(f"share {share} of the energy to keep must be above 0 and at most 1")
    model, variables, description = checkpoint.load_model(directory)
    params = layers.unstack_layers(jax.device_get(variables["params"]))
    gathered, by = None, "by weights and norm scales, without data"
    if calibration is not None:
        preprocessing = Preprocessing(**description["preprocessing"])
        images = calibration.read(model.image_shape, description["channels"], preprocessing)
        gathered, by = gather_moments(model, variables, images), f"on {len(images)} images"
    rows, most = [], 0
    for i in range(model.depth):
        layer = params[f"blocks_{i}"]
        norm = layer["norm1"]
        moments = gathered[f"blocks_{i}"] if gathered else data_free_moments(**norm)
        num_kv_heads, keys, values = _fewest(layer["attn"], moments, share)
        rows.append((str(i), str(num_kv_heads), f"{100 * keys:.2f}", f"{100 * values:.2f}"))
        most = max(most, num_kv_heads)
    have = model.attention["num_kv_heads"]
    return rows, f"every layer keeps {share:.4g} with {most} of {have} key/value heads, {by}"


def _fewest(attention: Attention, moments: InputMoments, share: float) -> tuple[Any, ...]:
    """(K, share of keys kept, share of values kept) for the smallest K that keeps `share`."""
    have = np.shape(attention["key"]["kernel"])[1]
    for num_kv_heads in (k for k in range(1, have + 1) if have % k == 0):
        merged = merge_heads(attention, num_kv_heads, moments)
        kept = [
            1.0 - lost.sum() / (energy.sum() or 1.0)
            for energy, lost in (
                (merged.key_energy, merged.key_lost),
                (merged.value_energy, merged.value_lost),
            )
        ]
        if min(kept) >= share:
            break
    return num_kv_heads, *kept
