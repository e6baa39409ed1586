"""Small data sets on disk, and what is expected of sources; for the tests of sources."""

import re
import struct
from gzip import compress

import numpy as np
import pytest
from PIL import Image

from kdgqa_jax.data import sources
from kdgqa_jax.errors import UserError


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def write_idx(path, array):
    """An IDX file of unsigned bytes, byte by byte as its format is defined."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    path.write_bytes(compress(header + array.astype(np.uint8).tobytes()))


def folder_tree(root, classes=("ant", "bee"), count=3):
    """Images of different sizes: image i of class c is 4 + c high, 5 + i wide."""
    for c, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i:03}.png", noise(100 * c + i, 4 + c, 5 + i, 3))


def rows(split):
    """All (label, bytes of the image) of a split, in order."""
    for item in split:
        assert item["image"].dtype == np.uint8 and item["image"].ndim == 3
        assert item["label"].dtype == np.int32
    return [(int(item["label"]), item["image"].tobytes()) for item in split]


def refused(says, name, data_dir=None):
    """The sentence with which `load` refuses."""
    with pytest.raises(UserError) as error:
        sources.load(name, data_dir and str(data_dir))
    text = str(error.value)
    assert says in text and "\n" not in text
    return text


def refused_on_access(split, index, says):
    with pytest.raises(UserError, match=re.escape(says)):
        split[index]
