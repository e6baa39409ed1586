"""Data sets that packages of Python or Debian carry; images are read where they were installed."""

import importlib.util
import os
import pathlib

import numpy as np

from kdgqa_jax.data import images
from kdgqa_jax.data.dataset import Dataset
from kdgqa_jax.data.image_folders import FileSplit, class_names_in, drawn_for_test
from kdgqa_jax.errors import UserError

TEST_SHARE = 0.25
"""Of each kind of image, drawn with the seed 0 from their names in order."""

STAMPS = "/usr/share/tuxpaint/stamps"
"""Where Debian's tuxpaint-stamps-default puts them."""

_STAMPS_OF_THE_PROGRAM = "cartoon"
"""A folder that Debian's tuxpaint-data puts there, too; the data set is the same without it."""

ELPV_CLASSES = ("0 %", "33 %", "67 %", "100 %")
"""How probable it is that a solar cell is defective, as experts have labelled it."""

_LEVELS = (0.0, 1 / 3, 2 / 3, 1.0)
_TYPES = ("mono", "poly")


def read_elpv(name: str, data_dir: str, how: str) -> Dataset:
    """2,624 photographs of solar cells, 300x300, by electroluminescence, in four levels of defects.

    Of each level and type of cell (mono- and polycrystalline) a quarter is for the test. Images are
    RGB, with three times the same grey. Source: Buerhop-Lutz et al., "A Benchmark for Visual
    Identification of Defective Solar Cells in Electroluminescence Imagery", EU PVSEC 2018; CC
    BY-NC-SA 4.0.

    Args:
      name: of the data set.
      data_dir: the folder of labels.csv; "": that of the installed package elpv-dataset.
      how: the sentence that says how to get the files.

    Raises:
      UserError: they are not there, or labels.csv is damaged.
    """
    root = pathlib.Path(data_dir) if data_dir else _installed("elpv_dataset", "data")
    if root is None or not (root / "labels.csv").is_file():
        place = root / "labels.csv" if root else "the package elpv-dataset"
        raise UserError(f"{place} not found; {how}")
    names, labels, kinds = [], [], []
    for number, line in enumerate((root / "labels.csv").read_text("utf-8").splitlines(), 1):
        try:
            file, probability, kind = line.split()
            level = int(np.argmin(np.abs(np.array(_LEVELS) - float(probability))))
            kinds.append(level + len(_LEVELS) * _TYPES.index(kind))
        except ValueError:
            raise UserError(
                f"{root / 'labels.csv'}: line {number} is {line[:80]!r}; expected a file, a"
                " probability and mono or poly; install the package again"
            ) from None
        names.append(file)
        labels.append(level)
    missing = next((file for file in names if not (root / file).is_file()), None)
    if missing or not names:
        raise UserError(f"{root / (missing or 'images')} not found; install the package again")
    return _split(name, ELPV_CLASSES, root, names, np.array(labels), np.array(kinds))


def read_stamps(name: str, data_dir: str, how: str) -> Dataset:
    """The stamps of Tux Paint, 796 pictures with the names of 16 folders for classes.

    Pictures lie at any depth below the folder of their class; six that come with the program itself
    (`cartoon`) are left out, so that it makes no difference whether that is installed. Of each
    class a quarter is for the test. Transparent parts have the colour that the file gives them.
    GPL-2.

    Args:
      name: of the data set.
      data_dir: the folder of the class folders; "": `STAMPS`.
      how: the sentence that says how to get the files.

    Raises:
      UserError: the folder is not there, or has no class with two pictures.
    """
    root = pathlib.Path(data_dir or STAMPS)
    if not root.is_dir():
        raise UserError(f"{root} not found; {how}")
    classes = tuple(name for name in class_names_in(root) if name != _STAMPS_OF_THE_PROGRAM)
    names, labels = [], []
    for label, class_name in enumerate(classes):
        files = [path for path in images.find([root / class_name]) if path.suffix == ".png"]
        names += [os.path.relpath(path, root) for path in files]
        labels += [label] * len(files)
    if not names:
        raise UserError(f"{root} holds no folders with pictures; {how}")
    return _split(name, classes, root, names, np.array(labels), np.array(labels))


def _installed(package: str, folder: str) -> pathlib.Path | None:
    """A folder of an installed package, which is not imported; None: it is not installed."""
    found = importlib.util.find_spec(package)
    return pathlib.Path(found.origin).parent / folder if found and found.origin else None


def _split(
    name: str,
    classes: tuple[str, ...],
    root: pathlib.Path,
    names: list[str],
    labels: np.ndarray,
    kinds: np.ndarray,
) -> Dataset:
    is_test = drawn_for_test(kinds, TEST_SHARE)
    train, test = (
        FileSplit(
            str(root), [names[i] for i in np.flatnonzero(part)], labels[part].astype(np.int32)
        )
        for part in (~is_test, is_test)
    )
    return Dataset(name, classes, train, test)
