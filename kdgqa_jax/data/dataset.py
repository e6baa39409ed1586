"""What a data set is: classes and two splits.

A split is random access: `len(split)` and `split[i] -> {"image": uint8 HWC, "label": int32}`. One
of compressed images also has `split.open(i) -> (PIL image, label)`, which saves whoever resizes the
image the way through an array and back, and `split.encoded(i) -> bytes`, the stored file.
`split.listing()` gives bytes that identify its examples, in their order, without reading
image files: see `identity`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.errors import UserError

Split = Sequence[dict[str, Any]]


def listing(split: Split) -> Iterator[bytes]:
    """What a split says of its examples; nothing where it has no listing."""
    return split.listing() if hasattr(split, "listing") else iter(())


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: images (n, H, W, C) uint8 and labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def listing(self) -> Iterator[bytes]:
        """Labels and pixels: see the top of this file."""
        yield self.labels.astype("<i4").tobytes()
        yield from map(np.ascontiguousarray, self.images)


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
        """(height, width, channels) of every image, or of the first that can be read.

        Raises UserError: none can.
        """
        if self.native_size is not None:
            return self.native_size
        why = ""
        for index in range(len(self.train)):
            try:
                return self.train[index]["image"].shape
            except UserError as error:
                why = why or f"; the first: {error}"
        raise UserError(f"none of the {len(self.train)} images of {self.name} can be read{why}")


def check_images(dataset: Dataset) -> None:
    """Raise UserError for a split without images."""
    for use, split in (("train", dataset.train), ("test", dataset.test)):
        if not len(split):
            raise UserError(f"data set {dataset.name!r} has no images to {use} on")


def check_dataset(dataset: Dataset) -> None:
    """Raise UserError for a data set of somebody's own whose first examples are none.

    Others than the first are not looked at, since that may mean reading them all.
    """
    where = f"data set {dataset.name!r}"
    if not dataset.class_names or not all(isinstance(n, str) for n in dataset.class_names):
        raise UserError(f"{where}: class_names={dataset.class_names!r} must be names of classes")
    check_images(dataset)
    for use, split in (("train", dataset.train), ("test", dataset.test)):
        item = split[0]
        if not isinstance(item, Mapping) or not {"image", "label"} <= item.keys():
            raise UserError(f'{where}, {use}[0]: expected a dict with "image" and "label"')
        image, label = np.asarray(item["image"]), np.asarray(item["label"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise UserError(
                f"{where}, {use}[0]: the image is {image.dtype} of shape {image.shape}; expected"
                " uint8 (height, width, channels) with 1 or 3 channels"
            )
        classes = len(dataset.class_names)
        if label.dtype.kind not in "iu" or label.ndim or not 0 <= label < classes:
            raise UserError(
                f"{where}, {use}[0]: the label is {label!r}; expected an integer from 0 to"
                f" {classes - 1}"
            )
