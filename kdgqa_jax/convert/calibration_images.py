"""Images to calibrate a conversion with, by name: of a data set, or of a folder of image files."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from kdgqa_jax.data import images as image_files
from kdgqa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CalibrationImages:
    """Which images, before it is known how a model wants them.

    Attributes:
      place: a data set of `data.sources` (its training images), or a folder of image files at any
        depth.
      data_dir: where the files of the data set are.
      count: how many; all, where there are no more.
      seed: of the choice, which depends on nothing else.
    """

    place: str
    data_dir: str = ""
    count: int = 512
    seed: int = 0

    def read(
        self, shape: tuple[int, int], channels: int, preprocessing: image_files.Preprocessing
    ) -> np.ndarray:
        """`(n, *shape, channels)` float32, prepared and normalised as a checkpoint says.

        Raises UserError: no such data set or folder, images that cannot be read, a count below 1,
        a number of channels other than 1 and 3.
        """
        if self.count < 1:
            raise UserError(f"{self.count} calibration images were asked for; expected at least 1")
        if channels not in (1, 3):
            raise UserError(
                f"images of {self.place} give 1 or 3 channels, the model takes {channels};"
                " calibrate in Python with an array"
            )
        images = self._images(shape, channels, preprocessing)
        return preprocessing.normalise(np.stack(images))

    def _images(self, shape: tuple[int, int], channels: int, preprocessing: Any) -> list[Any]:
        from kdgqa_jax.data import sources

        try:
            sources.find_source(self.place)
        except UserError as error:
            if not pathlib.Path(self.place).is_dir():
                raise UserError(
                    f"{self.place!r} is neither a folder of images nor a data set ({error})"
                ) from None
            files = image_files.find([self.place])
            chosen = (files[i] for i in self._chosen(len(files)))
            return [image_files.read(file, shape, channels, preprocessing) for file in chosen]
        split = sources.load(self.place, self.data_dir).train
        chosen = (_image(split, i, channels) for i in self._chosen(len(split)))
        return [image_files.to_array(preprocessing.resized(image, shape)) for image in chosen]

    def _chosen(self, available: int) -> list[int]:
        """The positions that a shuffle by the seed puts first, in ascending order."""
        first = np.random.default_rng(self.seed).permutation(available)[: self.count]
        return sorted(first.tolist())


def _image(split: Any, index: int, channels: int) -> Any:
    """A PIL image of a split, RGB or grey."""
    from PIL import Image

    if hasattr(split, "open"):
        image, _ = split.open(index)
    else:
        pixels = split[index]["image"]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return image.convert("RGB" if channels == 3 else "L")
