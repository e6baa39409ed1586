"""Image files of any kind, prepared for a model as its description says."""

import dataclasses
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kdgqa_jax import storage
from kdgqa_jax.data import modes
from kdgqa_jax.errors import UserError, one_line, unknown

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
RESIZES = ("squash", "shorter_side")
WHOLE_LIMIT = 2**24  # pixels
ROUNDINGS = ("nearest", "timm", "hugging_face")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become input of a model.

    Attributes:
      mean: of pixel values in 0..1, one number or one per channel.
      std: of pixel values in 0..1, one number or one per channel.
      interpolation: a filter of PIL by name.
      resize: "squash" (to the size whatever the shape, as the paper does it) or "shorter_side"
        (keep the shape, crop the middle).
      crop_share: the share of the resized image that the crop in the middle keeps, in (0, 1]: an
        image for side s is resized to s / crop_share.
      rounding: how sides and the corner of the crop become whole pixels: "nearest" (the longer side
        too; the corner down), "timm" (sides down, as crop_pct is meant there; the corner to the
        nearest) or "hugging_face" (the longer side and the corner down).
    """

    mean: Any = 0.5
    std: Any = 0.5
    interpolation: str = "bilinear"
    resize: str = "squash"
    crop_share: float = 1.0
    rounding: str = "nearest"

    def __post_init__(self):
        try:
            mean, std = (np.asarray(x, np.float64) for x in (self.mean, self.std))
            usable = max(mean.ndim, std.ndim) <= 1 and np.isfinite(mean).all()
            usable = usable and np.isfinite(std).all() and (std > 0).all()
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise UserError(
                f"images cannot be normalised by mean {one_line(self.mean)} and std"
                f" {one_line(self.std)}: expected finite numbers, and std above 0"
            )
        number = isinstance(self.crop_share, numbers.Real)
        if not number or not 0.0 < self.crop_share <= 1.0:
            raise UserError(f"crop_share={one_line(self.crop_share)} must be above 0 and at most 1")
        if self.resize not in RESIZES:
            raise unknown("resize", self.resize, RESIZES)
        if self.rounding not in ROUNDINGS:
            raise unknown("rounding", self.rounding, ROUNDINGS)
        filters = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
        if self.interpolation not in filters:
            raise unknown("interpolation", self.interpolation, filters)

    def resized(self, image: Any, shape: tuple[int, int]) -> Any:
        """A PIL image of `shape` (height, width).

        The whole image is resized and then cropped; where that takes more than `WHOLE_LIMIT`
        pixels (one of 1x30,000, say), only what the crop keeps is computed, within rounding.
        """
        to_whole = math.floor if self.rounding == "timm" else round
        height, width = (to_whole(side / self.crop_share) for side in shape)
        if self.resize == "shorter_side":
            height, width = self._kept_shape(image, height, width)
        kernel = Image.Resampling[self.interpolation.upper()]
        left, top = width - shape[1], height - shape[0]
        if self.rounding == "timm":
            left, top = round(left / 2), round(top / 2)
        else:
            left, top = left // 2, top // 2
        right, bottom = left + shape[1], top + shape[0]
        if height * width > WHOLE_LIMIT:
            across, down = image.width / width, image.height / height
            far = min(right * across, image.width), min(bottom * down, image.height)
            return image.resize(shape[::-1], kernel, (left * across, top * down, *far))
        image = image.resize((width, height), kernel)
        if (height, width) == tuple(shape):
            return image
        return image.crop((left, top, right, bottom))

    def _kept_shape(self, image: Any, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the shape of the image, of which one is as given, the other larger."""
        if self.rounding == "nearest" or height != width:
            scale = max(height / image.height, width / image.width)
            return round(image.height * scale), round(image.width * scale)
        shorter = min(image.height, image.width)
        return int(height * image.height / shorter), int(width * image.width / shorter)

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """uint8 (..., C) -> float32 (..., C)."""
        scaled = images.astype(np.float32) / 255.0
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


# --- What lies in a folder ----------------------------------------------------------------------


def names(folder: str | os.PathLike, keep: Callable[[os.DirEntry], bool]) -> list[str]:
    """Names in a folder, sorted, without hidden ones. Raises UserError if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and keep(e))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed ({error.strerror}); expected a folder that may be read"
        ) from None


def is_image(entry: os.DirEntry) -> bool:
    """By its name; a link that leads nowhere counts, so that reading it fails with its name."""
    return entry.name.lower().endswith(SUFFIXES) and (
        entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    )


def _inside(folder: pathlib.Path, above: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Image files at any depth; links are followed, but not to a folder that they lie in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for name in names(folder, is_image):
        yield folder / name
    for name in names(folder, os.DirEntry.is_dir):
        yield from _inside(folder / name, (*above, real))


def find(places: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    """Image files by name, and those in folders, at any depth, in the order of their names.

    Hidden files and folders count only where they are named themselves.

    Raises UserError: nothing there, or a folder without images or that cannot be listed.
    """
    found = []
    for place in map(storage.fetched, places):
        if place.is_dir():
            inside = sorted(_inside(place))
            if not inside:
                raise UserError(f"{place}: holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif place.is_file():
            found.append(place)
        elif place.exists():
            raise UserError(f"{place} is neither a file nor a folder")
        else:
            raise UserError(f"{place} not found")
    return found


# --- Reading ------------------------------------------------------------------------------------


def opened(file: Any, name: Any, channels: int = 3) -> Any:
    """A PIL image of any mode and size as RGB (3 channels) or grey (1), upright.

    It is turned as its EXIF data says, wherever it comes from; `modes` says what becomes of other
    modes.

    Args:
      file: a path, or a binary file object.
      name: what errors call it.
      channels: 3 or 1.

    Raises:
      UserError: not an image that can be read, one of too many pixels, or of a mode that cannot be
        converted.
    """
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        return modes.converted(image, channels)
    except Exception as error:  # decoders of damaged files raise anything
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        elif isinstance(error, MemoryError):
            reason = "more pixels than there is memory for"
        raise UserError(f"{name}: not an image that can be read ({one_line(reason)})") from None


def to_array(image: Any) -> np.ndarray:
    """An RGB or grey PIL image as uint8 (height, width, 3 or 1)."""
    # np.asarray(image) gives the same in twice the time.
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


def read(
    path: pathlib.Path, shape: tuple[int, int], channels: int, preprocessing: Preprocessing
) -> np.ndarray:
    """An image of any mode, upright: uint8 (height, width, channels).

    Raises UserError: not an image that can be read, or a number of channels other than 1 and 3.
    """
    if channels not in (1, 3):
        raise UserError(f"{path}: image files give 1 or 3 channels, the model takes {channels}")
    image = opened(path, path, channels)
    return to_array(preprocessing.resized(image, shape))
