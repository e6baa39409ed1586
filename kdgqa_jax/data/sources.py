"""Data sets by name: what images and labels they hold. `SOURCES` is the table.

A split is random access: `len(split)` and `split[i] -> {"image": uint8 HWC, "label": int32}`.
"""

import dataclasses
import gzip
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.errors import UserError, unknown


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
    """A data set: its classes and its two splits."""

    name: str
    class_names: tuple[str, ...]
    train: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the stored images."""
        return self.train[0]["image"].shape


# --- digits -------------------------------------------------------------------------------------


def _digits(data_dir: str | None) -> Dataset:
    """scikit-learn's 1,797 real 8x8 grey images; 1,437 to train, 360 to test, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    parts = train_test_split(
        images, labels.astype(np.int32), test_size=360, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = parts
    return Dataset(
        "digits",
        tuple(str(digit) for digit in range(10)),
        ArraySplit(train_images, train_labels),
        ArraySplit(test_images, test_labels),
    )


# --- IDX files ----------------------------------------------------------------------------------

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file.

    Raises UserError for a file that cannot be read, is no IDX file of bytes, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable gzip file ({error}); fetch it again") from None
    dims = raw[3] if len(raw) > 3 else 0
    if len(raw) < 4 + 4 * dims or raw[:3] != b"\x00\x00\x08":
        raise UserError(f"{path}: not an IDX file of unsigned bytes; fetch it again")
    shape = tuple(np.frombuffer(raw, ">u4", count=dims, offset=4).tolist())
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if data.size != np.prod(shape, dtype=np.int64):
        raise UserError(
            f"{path}: holds {data.size} bytes of data where its header, shape {shape}, promises"
            f" {np.prod(shape, dtype=np.int64)}; fetch it again"
        )
    return data.reshape(shape)


def _idx_directory(name: str, class_names: tuple[str, ...], data_dir: str | None) -> Dataset:
    """A data set in the four gzipped IDX files that MNIST and its successors come in."""
    files = [file for pair in _IDX_FILES.values() for file in pair]
    if not data_dir:
        raise UserError(
            f"data set {name!r} needs a data directory (--data-dir) that holds {', '.join(files)}"
        )
    folder = pathlib.Path(data_dir)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing)} not found; data set {name!r} needs the files"
            f" {', '.join(files)} there"
        )
    splits = {}
    for split, (image_file, label_file) in _IDX_FILES.items():
        images, labels = read_idx(folder / image_file), read_idx(folder / label_file)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{folder}: {image_file} {images.shape} and {label_file} {labels.shape} do not"
                " belong together; expected n images and n labels"
            )
        if labels.max(initial=0) >= len(class_names):
            raise UserError(
                f"{folder / label_file}: label {labels.max()} is out of range for"
                f" {len(class_names)} classes"
            )
        splits[split] = ArraySplit(images[..., None], labels.astype(np.int32))
    return Dataset(name, class_names, **splits)


_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

SOURCES: dict[str, Callable[[str | None], Dataset]] = {
    "digits": _digits,
    "fashion_mnist": lambda data_dir: _idx_directory("fashion_mnist", _FASHION_CLASSES, data_dir),
}


# --- shifted versions ---------------------------------------------------------------------------

SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {
    "none": None,
    "negative": lambda image: 255 - image,  # dark on light
    "quarter_turn": lambda image: np.rot90(image, axes=(0, 1)),  # counter-clockwise
    "negative_quarter_turn": lambda image: 255 - np.rot90(image, axes=(0, 1)),
}
"""Fixed changes of every image, HWC -> HWC, that make a related data set to fine-tune on."""


@dataclasses.dataclass(frozen=True)
class ShiftedSplit:
    """A split whose images went through one of `SHIFTS`."""

    split: Sequence[dict[str, Any]]
    shift: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.split[index]
        return {**item, "image": np.ascontiguousarray(self.shift(item["image"]))}


def load(name: str, data_dir: str | None = None, shift: str = "none") -> Dataset:
    """A data set of `SOURCES`, its images changed by one of `SHIFTS`.

    Raises UserError: unknown name or shift, or a data directory that does not hold the set.
    """
    if name not in SOURCES:
        raise unknown("data set", name, SOURCES)
    if shift not in SHIFTS:
        raise unknown("shift", shift, SHIFTS)
    dataset = SOURCES[name](data_dir)
    function = SHIFTS[shift]
    if function is None:
        return dataset
    return dataclasses.replace(
        dataset,
        train=ShiftedSplit(dataset.train, function),
        test=ShiftedSplit(dataset.test, function),
    )
