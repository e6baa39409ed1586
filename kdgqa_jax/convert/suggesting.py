"""How few key/value heads each layer of a model directory can do with."""

import os

from kdgqa_jax import checkpoint
from kdgqa_jax.convert.calibration_images import CalibrationImages
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.heads.suggesting import check_share, fewest_kv_heads


def suggest_kv_heads(
    directory: str | os.PathLike, share: float, calibration: CalibrationImages | None = None
) -> tuple[list[tuple[str, ...]], str]:
    """`heads.suggesting.fewest_kv_heads` of a model directory.

    Args:
      directory: a model directory.
      share: of the energy of the layer's keys and of that of its values, in (0, 1].
      calibration: images that the energy is measured on; None: by weights and norm scales alone.

    Returns:
      A row under `SUGGESTION_HEADER` for each layer, and a sentence that sums them up.

    Raises:
      UserError: no model there, a share out of range, bad calibration images, a kind of block whose
        heads cannot be merged.
    """
    check_share(share)
    model, variables, description = checkpoint.load_model(directory)
    images = None
    if calibration is not None:
        preprocessing = Preprocessing(**description["preprocessing"])
        images = calibration.read(model.image_shape, description["channels"], preprocessing)
    return fewest_kv_heads(model, variables, share, images)
