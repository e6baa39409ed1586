"""What a data set is: classes and two splits.

A split is random access: `len(split)` and `split[i] -> {"image": uint8 HWC, "label": int32}`. One
of compressed images also has `split.open(i) -> (PIL image, label)`, which saves whoever resizes the
image the way through an array and back, and `split.encoded(i) -> bytes`, the stored file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Split = Sequence[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: images (n, H, W, C) uint8 and labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: its classes and its two splits.

    Attributes:
      name: as `sources.load` took it.
      class_names: in the order of the labels.
      train: what is trained on.
      test: what is evaluated on.
      native_size: (height, width, channels) of every image; None where they vary.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    native_size: tuple[int, int, int] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the first stored image."""
        return self.train[0]["image"].shape
