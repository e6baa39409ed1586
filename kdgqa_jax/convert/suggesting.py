"""How few key/value heads each layer of a model can do with."""

import os

import jax

from kdgqa_jax import checkpoint, layers
from kdgqa_jax.convert.calibration import gather_moments
from kdgqa_jax.convert.calibration_images import CalibrationImages
from kdgqa_jax.convert.heads import as_equal_groups
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
    params, fixed = as_equal_groups(model, variables)
    params = layers.unstack_layers(jax.device_get(params))
    gathered, by = None, "by weights and norm scales, without data"
    if calibration is not None:
        preprocessing = Preprocessing(**description["preprocessing"])
        images = calibration.read(model.image_shape, description["channels"], preprocessing)
        gathered, by = gather_moments(model, variables, images), f"on {len(images)} images"
    by += "" if fixed else ", groups taken as equal"
    have = model.attention.num_kv_heads
    fewer = [k for k in range(1, have) if have % k == 0]
    rows, enough = [], {*fewer, have}
    for i in range(model.depth):
        layer = params[f"blocks_{i}"]
        norm = layer["norm1"]
        moments = gathered[f"blocks_{i}"] if gathered else data_free_moments(**norm)
        kept = {k: _kept(layer["attn"], moments, k) for k in fewer} | {have: (1.0, 1.0)}
        keeping = [k for k, shares in kept.items() if min(shares) >= share]
        enough &= set(keeping)  # two groups may keep more than three, which cut elsewhere
        keys, values = kept[keeping[0]]
        rows.append((str(i), str(keeping[0]), f"{100 * keys:.2f}", f"{100 * values:.2f}"))
    return rows, f"every layer keeps {share:.4g} with {min(enough)} of {have} key/value heads, {by}"


def _kept(attention: Attention, moments: InputMoments, num_kv_heads: int) -> tuple[float, float]:
    """Shares of the energy of keys and of values that merging keeps."""
    merged = merge_heads(attention, num_kv_heads, moments)
    keys, values = (
        1.0 - float(lost.sum() / (energy.sum() or 1.0))
        for energy, lost in (
            (merged.key_energy, merged.key_lost),
            (merged.value_energy, merged.value_lost),
        )
    )
    return keys, values
