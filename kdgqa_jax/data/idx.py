"""Gzipped IDX files, the form that MNIST and its successors come in."""

import gzip
import pathlib
import zlib

import numpy as np

from kdgqa_jax.data.dataset import ArraySplit
from kdgqa_jax.errors import UserError

_SPLITS = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FILES = tuple(file for pair in _SPLITS.values() for file in pair)


def any_in(folder: pathlib.Path) -> bool:
    """Whether at least one of the four files lies in a folder."""
    return any((folder / file).is_file() for file in FILES)


def read_idx(path: pathlib.Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file.

    Raises UserError for a file that cannot be read, is no IDX file of bytes, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from None
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


def read_splits(folder: pathlib.Path, num_classes: int, how: str) -> dict[str, ArraySplit]:
    """The splits "train" and "test" of a folder of the four files; `how` says how to get them.

    Raises UserError: a file is missing, damaged, or does not fit the others.
    """
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} not found; {how}")
    splits = {}
    for split, (image_file, label_file) in _SPLITS.items():
        images, labels = read_idx(folder / image_file), read_idx(folder / label_file)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UserError(
                f"{folder}: {image_file} {images.shape} and {label_file} {labels.shape} do not"
                " belong together; expected n images and n labels"
            )
        if labels.max(initial=0) >= num_classes:
            raise UserError(
                f"{folder / label_file}: label {labels.max()} is out of range for"
                f" {num_classes} classes"
            )
        splits[split] = ArraySplit(images[..., None], labels.astype(np.int32))
    return splits
