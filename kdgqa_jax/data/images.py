"""Image files of any kind, prepared for a model as its description says."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from kdgqa_jax.errors import UserError, unknown

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
RESIZES = ("squash", "shorter_side")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become input of a model.

    Attributes:
      mean: of pixel values in 0..1, one number or one per channel.
      std: of pixel values in 0..1, one number or one per channel.
      interpolation: a filter of PIL by name.
      resize: "squash" (to the size whatever the shape, as the paper does it) or "shorter_side"
        (keep the shape, crop the middle).
      crop_share: the share of the resized image that the crop in the middle keeps, in (0, 1].
    """

    mean: Any = 0.5
    std: Any = 0.5
    interpolation: str = "bilinear"
    resize: str = "squash"
    crop_share: float = 1.0

    def __post_init__(self):
        mean, std = (np.asarray(x, np.float64) for x in (self.mean, self.std))
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise UserError(
                f"images cannot be normalised by mean {self.mean} and std {self.std}: expected"
                " finite numbers, and std above 0"
            )
        if not 0.0 < self.crop_share <= 1.0:
            raise UserError(f"crop_share={self.crop_share} must be above 0 and at most 1")
        if self.resize not in RESIZES:
            raise unknown("resize", self.resize, RESIZES)
        filters = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
        if self.interpolation not in filters:
            raise unknown("interpolation", self.interpolation, filters)

    def resized(self, image: Any, shape: tuple[int, int]) -> Any:
        """A PIL image of `shape` (height, width)."""
        from PIL import Image

        height, width = (round(side / self.crop_share) for side in shape)
        if self.resize == "shorter_side":
            scale = max(height / image.height, width / image.width)
            height, width = round(image.height * scale), round(image.width * scale)
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if (height, width) == tuple(shape):
            return image
        left, top = (width - shape[1]) // 2, (height - shape[0]) // 2
        return image.crop((left, top, left + shape[1], top + shape[0]))

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8 (..., C) -> float32 (..., C)."""
        scaled = images.astype(np.float32) / 255.0
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def _from_16_bits(x: np.ndarray) -> np.ndarray:
    return np.clip(x, 0, 65535) >> 8


# Modes of more than 8 bits, which PIL would clip: 16 bits of grey, and floats in 0..1 or 0..255.
_TO_BYTES = {
    **dict.fromkeys(("I", "I;16", "I;16L", "I;16B", "I;16N"), _from_16_bits),
    "F": lambda x: np.clip(np.round(x * (255.0 if x.max() <= 1.0 else 1.0)), 0, 255),
}


def find(places: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    """Image files by name, and those in folders, at any depth, in the order of their names.

    Raises UserError: nothing there, or a folder without images.
    """
    found = []
    for place in map(pathlib.Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"{place}: holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"{place} not found")
    return found


def opened(file: Any, name: Any, channels: int = 3, upright: bool = False) -> Any:
    """A PIL image of any mode and size as RGB (3 channels) or grey (1).

    Args:
      file: a path, or a binary file object.
      name: what errors call it.
      channels: 3 or 1.
      upright: turn it as its EXIF data says.

    Raises:
      UserError: not an image that can be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            image.load()
            if upright:
                image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known format"
        raise UserError(f"{name}: not an image that can be read ({reason})") from None
    if image.mode in _TO_BYTES:
        image = Image.fromarray(_TO_BYTES[image.mode](np.asarray(image)).astype(np.uint8))
    elif image.mode == "P":  # the palette may hold transparency
        image = image.convert("RGBA")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Any) -> np.ndarray:
    """An RGB or grey PIL image as uint8 (height, width, 3 or 1)."""
    # np.asarray(image) gives the same in twice the time.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


def read(
    path: pathlib.Path, shape: tuple[int, int], channels: int, preprocessing: Preprocessing
) -> np.ndarray:
    """An image of any mode, turned as its EXIF data says: uint8 (height, width, channels).

    Raises UserError: not an image that can be read, or a number of channels other than 1 and 3.
    """
    if channels not in (1, 3):
        raise UserError(f"{path}: image files give 1 or 3 channels, the model takes {channels}")
    image = opened(path, path, channels, upright=True)
    return to_array(preprocessing.resized(image, shape))
