"""Data sets that are trees of image files; a file is read and decoded when its image is asked for.

Images come as RGB, upright: turned as their EXIF data says.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kdgqa_jax import storage
from kdgqa_jax.data import images
from kdgqa_jax.data.dataset import Dataset
from kdgqa_jax.errors import UserError

CINIC10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CINIC10_CLASSES += ("dog", "frog", "horse", "ship", "truck")
TEST_SHARE = 0.1  # of each class, where a folder has no split of its own


@dataclasses.dataclass(frozen=True)
class FileSplit:
    """A split of image files: names relative to the folder `root`, and labels (n,) int32."""

    root: str
    names: Sequence[str] = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def listing(self) -> Iterator[bytes]:
        """Labels and names: see `dataset`."""
        yield self.labels.astype("<i4").tobytes()
        yield "\0".join(self.names).encode(errors="surrogateescape")

    def encoded(self, index: int) -> bytes:
        """The file: see `dataset.Split`."""
        return pathlib.Path(self.root, self.names[index]).read_bytes()

    def open(self, index: int) -> tuple[Any, np.int32]:
        """(PIL image, label): see `dataset.Split`."""
        path = os.path.join(self.root, self.names[index])
        return images.opened(path, path), self.labels[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.open(index)
        return {"image": images.to_array(image), "label": label}


# --- What lies in a folder ----------------------------------------------------------------------


def class_names_in(folder: pathlib.Path) -> tuple[str, ...]:
    """The names of the folders in a folder, in order."""
    return tuple(images.names(folder, os.DirEntry.is_dir))


def _image_names(folder: pathlib.Path) -> list[str]:
    found = images.names(folder, images.is_image)
    if not found:
        raise UserError(
            f"{folder} holds no images ({', '.join(images.SUFFIXES)}); put those of the class"
            " there, or remove the folder"
        )
    return found


def _lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error}"
    raise UserError(f"{path} cannot be read ({reason}); unpack the data set again") from None


def _class_folders(
    folder: pathlib.Path, classes: Sequence[str], inside: str = ""
) -> tuple[list[str], np.ndarray]:
    """Names of the images in folder/CLASS/inside, relative to `folder`, and labels (n,) int32."""
    names, labels = [], []
    for label, name in enumerate(classes):
        found = [os.path.join(name, inside, file) for file in _image_names(folder / name / inside)]
        names += found
        labels += [label] * len(found)
    return names, np.array(labels, np.int32)


def _check_classes(folder: pathlib.Path, expected: Sequence[str], of: str) -> None:
    """Raise UserError unless a folder has the class folders that are expected, and no others."""
    there = set(class_names_in(folder))
    missing, more = sorted(set(expected) - there), sorted(there - set(expected))
    if missing:
        raise UserError(f"{folder / missing[0]} not found; expected a folder per class of {of}")
    if more:
        raise UserError(f"{folder / more[0]}: {more[0]!r} is not a class of {of}; remove it")


# --- Data sets ----------------------------------------------------------------------------------


def _root(data_dir: str, own_folder: str, marker: str, how: str) -> pathlib.Path:
    """DATA_DIR/own_folder or DATA_DIR, whichever holds `marker`. Raises UserError if none does."""
    for place in (pathlib.Path(data_dir, own_folder), pathlib.Path(data_dir)):
        if (place / marker).exists():
            return place
    raise UserError(f"{pathlib.Path(data_dir, own_folder, marker)} not found; {how}")


def read_tiny_imagenet(name: str, data_dir: str, how: str) -> Dataset:
    """Tiny ImageNet as it is unpacked; its 50 images a class for validation are the test split.

    Labels are in the order of the sorted WordNet ids, as in ImageNet itself; names are those of
    words.txt. `how` says how to get the files.

    Raises UserError: a file is missing, cannot be read, or does not fit the others.
    """
    root = _root(data_dir, "tiny-imagenet-200", "wnids.txt", how)
    wnids = sorted(line.strip() for line in _lines(root / "wnids.txt") if line.strip())
    if not wnids:
        raise UserError(f"{root / 'wnids.txt'} names no classes; unpack the data set again")
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    unnamed = [wnid for wnid in wnids if wnid not in words]
    if unnamed:
        raise UserError(f"{root / 'words.txt'} has no line for {unnamed[0]} of wnids.txt")
    train = FileSplit(str(root / "train"), *_class_folders(root / "train", wnids, "images"))

    annotations, folder = root / "val" / "val_annotations.txt", root / "val" / "images"
    there, labels = set(_image_names(folder)), {wnid: i for i, wnid in enumerate(wnids)}
    test_names, test_labels = [], []
    for number, line in enumerate(_lines(annotations), 1):
        file, wnid = (*line.split("\t"), "", "")[:2]
        if wnid not in labels:
            raise UserError(f"{annotations}: line {number}: class {wnid!r} is not in wnids.txt")
        if file not in there:
            raise UserError(f"{folder / file} not found; {annotations.name} names it")
        test_names.append(file)
        test_labels.append(labels[wnid])
    test = FileSplit(str(folder), test_names, np.array(test_labels, np.int32))
    return Dataset(name, tuple(words[wnid] for wnid in wnids), train, test)


def read_cinic10(name: str, data_dir: str, how: str) -> Dataset:
    """CINIC-10 as it is unpacked: train and test (valid is left alone).

    Raises UserError: a class is missing, or has no images.
    """
    root = _root(data_dir, "CINIC-10", "train", how)
    splits = {}
    for split in ("train", "test"):
        folder = root / split
        _check_classes(folder, CINIC10_CLASSES, "CINIC-10")
        splits[split] = FileSplit(str(folder), *_class_folders(folder, CINIC10_CLASSES))
    return Dataset(name, CINIC10_CLASSES, **splits)


def read_folder(name: str, path: str) -> Dataset:
    """Images in a folder per class; classes are in the order of their names.

    PATH/train/CLASS/* with PATH/val/CLASS/* (or, without it, PATH/test/CLASS/*) is taken as it is
    split. Otherwise PATH/CLASS/* is split here: of each class, a tenth of the images, at least
    one, is for the test, drawn with the seed 0 from the files in the order of their names, so that
    the same files always give the same split.

    Raises UserError: no classes, classes that differ between the splits, or one without images.
    """
    if not path:
        raise UserError("data set 'folder:' needs a path, as in folder:photos")
    root = storage.fetched(path, "folder").expanduser()
    classes = class_names_in(root)
    if "train" in classes:
        test = next((split for split in ("val", "test") if split in classes), None)
        if test is None:
            raise UserError(f"{root}: neither val nor test found beside train; add one of them")
        classes = class_names_in(root / "train")
        _check_some(root / "train", classes)
        _check_classes(root / test, classes, str(root / "train"))
        train_files = _class_folders(root / "train", classes)
        test_files = _class_folders(root / test, classes)
        return Dataset(
            name,
            classes,
            FileSplit(str(root / "train"), *train_files),
            FileSplit(str(root / test), *test_files),
        )
    _check_some(root, classes)
    names, labels = _class_folders(root, classes)
    for label, class_name in enumerate(classes):
        if np.sum(labels == label) < 2:
            raise UserError(
                f"{root / class_name} holds one image; expected at least two, to train and to test"
            )
    is_test = drawn_for_test(labels, TEST_SHARE)
    train, test = (
        FileSplit(str(root), [names[i] for i in np.flatnonzero(part)], labels[part])
        for part in (~is_test, is_test)
    )
    return Dataset(name, classes, train, test)


def drawn_for_test(kinds: np.ndarray, share: float) -> np.ndarray:
    """Which images are for the test, (n,) bool: a share of each kind, at least one.

    They are drawn with the seed 0, so that the same images in the same order give the same split.

    Args:
      kinds: (n,) int, of each image: its class, or something finer.
      share: of each kind.
    """
    is_test = np.zeros(len(kinds), bool)
    rng = np.random.RandomState(0)  # its stream is the same in all releases of NumPy
    for kind in np.unique(kinds):
        own = np.flatnonzero(kinds == kind)
        is_test[rng.permutation(own)[: max(round(share * len(own)), 1)]] = True
    return is_test


def _check_some(folder: pathlib.Path, classes: Sequence[str]) -> None:
    if not classes:
        raise UserError(f"{folder} holds no folders; expected one per class, with its images")
