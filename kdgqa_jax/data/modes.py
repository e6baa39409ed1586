"""Images of every mode that PIL knows, as 8 bits of red, green and blue, or of grey.

What has more than 8 bits is scaled, never cut off:

- 12 and 16 bits (`I;16`, 16-bit PNG and TIFF): the highest 8 of them.
- 32-bit integers (`I`) by their largest value: up to 255 as they are, up to 65,535 as 16 bits.
- floats (`F`) by their largest value: up to 1 as shares of white, up to 255 as they are.

Values beyond have an unknown range, and are refused.
"""

from typing import Any

import numpy as np
from PIL import Image

# Palettes may hold transparency, others have one way only.
_VIA = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "LAB": "RGB"}
_SIXTEEN_BITS = ("PNG", "PPM")  # formats of which PIL gives 16 bits as 32
_BITS_PER_SAMPLE = 258  # a tag of TIFF


def converted(image: Any, channels: int) -> Any:
    """A loaded PIL image as RGB (3 channels) or grey (1).

    Raises ValueError, which names the mode: values out of range, or a mode that PIL cannot convert.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(image))
    elif image.mode in _VIA:
        image = image.convert(_VIA[image.mode])
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _to_bytes(image: Any) -> np.ndarray:
    """Grey of more than 8 bits -> (height, width) uint8."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        return np.clip(values >> (max(bits, 8) - 8), 0, 255).astype(np.uint8)
    low, high = values.min(), values.max()
    if image.mode == "I" and low >= 0 and high <= 65535:
        sixteen = high > 255 or image.format in _SIXTEEN_BITS
        return (values >> 8 if sixteen else values).astype(np.uint8)
    if image.mode == "F" and low >= 0 and high <= 255:  # false for NaN
        return np.round(values * (255.0 if high <= 1.0 else 1.0)).astype(np.uint8)
    kinds = {"I": "32-bit integers", "F": "floats"}
    expected = {"I": "0 to 255 or 0 to 65535", "F": "0 to 1 or 0 to 255"}
    raise ValueError(
        f"mode {image.mode}: {kinds[image.mode]} from {low:g} to {high:g}; expected"
        f" {expected[image.mode]}"
    )
