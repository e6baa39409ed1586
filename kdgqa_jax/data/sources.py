"""Data sets by name: what images and labels they hold. `SOURCES` is the table.

A split is random access: `len(split)` and `split[i] -> {"image": uint8 HWC, "label": int32}`.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from kdgqa_jax import extras, paths, storage
from kdgqa_jax.data import idx, image_folders, packages, tfds_source
from kdgqa_jax.data.dataset import ArraySplit, Dataset, check_images
from kdgqa_jax.data.shifts import SHIFTS, ShiftedSplit
from kdgqa_jax.errors import UserError, unknown

__all__ = ["SHIFTS", "SOURCES", "ArraySplit", "Dataset", "Source", "load", "prepare"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A row of `SOURCES`.

    Attributes:
      read: (row, name, what stands after the colon of the name, data directory) -> Dataset.
      num_classes: None where the files say.
      class_names: the names in the order of the labels, or where they come from.
      native_size: (height, width, channels) of every image; None where they vary.
      train: what the set itself calls the split that is trained on.
      test: what it calls the one that is evaluated on.
      how: the sentence that says how to obtain its files; {name} and {data_dir} are filled in.
      tfds: whether tensorflow-datasets can prepare it.
      manual_files: what tensorflow-datasets cannot download for it.
      needs_dir: whether it needs a data directory.
      parts: files and folders in it; {name} is filled in. Of object storage these are copied.
      images: how many there are to train and to test on; None where the files say.
    """

    read: Callable[["Source", str, str, str], Dataset]
    num_classes: int | None
    class_names: tuple[str, ...] | str
    native_size: tuple[int, int, int] | None
    train: str
    test: str
    how: str
    tfds: bool = False
    manual_files: tuple[str, ...] = ()
    needs_dir: bool = True
    parts: tuple[str, ...] = ("{name}",)
    images: tuple[int, int] | None = None

    def how_to(self, name: str, data_dir: str) -> str:
        """How to obtain the files, in one sentence."""
        return self.how.format(name=name, data_dir=data_dir or "DIR")


# --- Readers ------------------------------------------------------------------------------------


def _digits(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    """scikit-learn's 1,797 real 8x8 grey images; 1,437 to train, 360 to test, always the same."""
    extras.needs("sklearn", f"data set {name!r}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    parts = train_test_split(
        images, labels.astype(np.int32), test_size=360, stratify=labels, random_state=0
    )
    train_images, test_images, train_labels, test_labels = parts
    return Dataset(
        name,
        source.class_names,
        ArraySplit(train_images, train_labels),
        ArraySplit(test_images, test_labels),
    )


def _tfds(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    splits = None if argument else (source.train, source.test)
    how = source.how_to(name, data_dir)
    return tfds_source.read(name, argument or name, data_dir, how, splits, source.num_classes)


def _idx_or_tfds(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    folder = pathlib.Path(data_dir)
    if not idx.any_in(folder) and tfds_source.find(name, data_dir):
        return _tfds(source, name, argument, data_dir)
    splits = idx.read_splits(folder, source.num_classes, source.how_to(name, data_dir))
    return Dataset(name, source.class_names, **splits)


def _tiny_imagenet(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    return image_folders.read_tiny_imagenet(name, data_dir, source.how_to(name, data_dir))


def _cinic10(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    return image_folders.read_cinic10(name, data_dir, source.how_to(name, data_dir))


def _elpv(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    return packages.read_elpv(name, data_dir, source.how_to(name, data_dir))


def _stamps(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    return packages.read_stamps(name, data_dir, source.how_to(name, data_dir))


def _folder(source: Source, name: str, argument: str, data_dir: str) -> Dataset:
    return image_folders.read_folder(name, argument)


# --- The table ----------------------------------------------------------------------------------

_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
_FASHION += ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = image_folders.CINIC10_CLASSES  # CINIC-10 has the classes of CIFAR-10
_STORED = "label.labels.txt of the prepared directory"

_PREPARE = "`kdgqa prepare --dataset {name} --data-dir {data_dir}` downloads and prepares it"
_PUT_IDX = f"put {', '.join(idx.FILES)} into {{data_dir}}, or: {_PREPARE}"
_IMAGENET = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")

SOURCES: dict[str, Source] = {
    "digits": Source(
        _digits, 10, _DIGITS, (8, 8, 1), "train", "test", "it comes with scikit-learn",
        needs_dir=False, images=(1_437, 360),
    ),
    "mnist": Source(
        _idx_or_tfds, 10, _DIGITS, (28, 28, 1), "train", "test", _PUT_IDX, tfds=True,
        parts=(*idx.FILES, "{name}"), images=(60_000, 10_000),
    ),
    "fashion_mnist": Source(
        _idx_or_tfds, 10, _FASHION, (28, 28, 1), "train", "test", _PUT_IDX, tfds=True,
        parts=(*idx.FILES, "{name}"), images=(60_000, 10_000),
    ),
    "cifar10": Source(_tfds, 10, _CIFAR10, (32, 32, 3), "train", "test", _PREPARE, tfds=True),
    "cifar100": Source(_tfds, 100, _STORED, (32, 32, 3), "train", "test", _PREPARE, tfds=True),
    "food101": Source(_tfds, 101, _STORED, None, "train", "validation", _PREPARE, tfds=True),
    "oxford_iiit_pet": Source(_tfds, 37, _STORED, None, "train", "test", _PREPARE, tfds=True),
    "imagenet2012": Source(
        _tfds, 1000, _STORED, None, "train", "validation",
        f"put {' and '.join(_IMAGENET)} of https://image-net.org into"
        f" {{data_dir}}/{tfds_source.MANUAL_DIR}, then `kdgqa prepare --dataset {{name}}"
        " --data-dir {data_dir}` prepares it",
        tfds=True, manual_files=_IMAGENET,
    ),
    "tiny_imagenet": Source(
        _tiny_imagenet, 200, "words.txt", (64, 64, 3), "train", "val",
        "download http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in {data_dir},"
        " which makes {data_dir}/tiny-imagenet-200",
        parts=("tiny-imagenet-200",),
    ),
    "cinic10": Source(
        _cinic10, 10, image_folders.CINIC10_CLASSES, (32, 32, 3), "train", "test",
        "download CINIC-10.tar.gz from https://datashare.ed.ac.uk/handle/10283/3192 and unpack it"
        " in {data_dir}/CINIC-10, which then holds train, valid and test",
        parts=("CINIC-10",),
    ),
    "elpv": Source(
        _elpv, 4, packages.ELPV_CLASSES, (300, 300, 3), "three quarters", "a quarter",
        "`pip install elpv-dataset` brings it (CC BY-NC-SA 4.0), or put its labels.csv and images"
        " into {data_dir}",
        needs_dir=False, images=(1_970, 654),
    ),
    "tuxpaint_stamps": Source(
        _stamps, 16, "names of the class folders", None, "three quarters", "a quarter",
        "`apt-get install tuxpaint-stamps-default` brings it (GPL-2), or unpack that package and"
        " give its usr/share/tuxpaint/stamps as the data directory",
        needs_dir=False, images=(596, 200),
    ),
    "folder:PATH": Source(
        _folder, None, "names of the class folders", None, "train", "val or test",
        "put the images of each class into PATH/train/CLASS and PATH/val/CLASS, or into PATH/CLASS"
        " to have a tenth of them taken for the test",
        needs_dir=False,
    ),
    "tfds:NAME": Source(
        _tfds, None, _STORED, None, "train", "test or validation", _PREPARE, tfds=True
    ),
}  # fmt: skip
"""Data sets by name; of those with a colon, what stands before it is the name."""


# --- By name ------------------------------------------------------------------------------------


def find_source(name: str) -> tuple[Source, str]:
    """The row of a data set, and what stands after the colon of its name.

    Raises UserError if no row has that name.
    """
    prefix, colon, argument = name.partition(":")
    for key, source in SOURCES.items():
        row, row_colon, _ = key.partition(":")
        if (row, row_colon) == (prefix, colon):
            return source, argument
    raise unknown("data set", name, SOURCES)


def load(name: str, data_dir: str | None = None, shift: str = "none") -> Dataset:
    """A data set of `SOURCES`, its images changed by one of `SHIFTS`; nothing is downloaded.

    Raises UserError: unknown name or shift, or a data directory that does not hold the set.
    """
    source, argument = find_source(name)
    if data_dir:
        paths.place(data_dir, "data directory")
    check_shift(shift)  # before anything is copied or read
    if source.needs_dir and not data_dir:
        raise UserError(
            f"data set {name!r} needs a data directory (--data-dir DIR): {source.how_to(name, '')}"
        )
    if data_dir and paths.is_remote(data_dir):
        data_dir = _fetched(source, name, argument, data_dir)
    try:
        dataset = source.read(source, name, argument, data_dir or "")
    except PermissionError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions"
        ) from None
    check_images(dataset)
    size = dataset.native_size or source.native_size
    return shifted(dataclasses.replace(dataset, native_size=size), shift)


def check_shift(shift: str) -> None:
    """Raise UserError for a name that is not in `SHIFTS`."""
    if shift not in SHIFTS:
        raise unknown("shift", shift, SHIFTS)


def shifted(dataset: Dataset, shift: str) -> Dataset:
    """A data set with its images changed by one of `SHIFTS`. Raises UserError: an unknown one."""
    check_shift(shift)
    size, change = dataset.native_size, SHIFTS[shift]
    if change is None:
        return dataset
    return dataclasses.replace(
        dataset,
        train=ShiftedSplit(dataset.train, shift),
        test=ShiftedSplit(dataset.test, shift),
        native_size=size and change(np.empty(size, np.uint8)).shape,
    )


def _fetched(source: Source, name: str, argument: str, data_dir: str) -> str:
    """The local copy of a data directory of object storage: of what the set has in it.

    Raises UserError: nothing of that is there.
    """
    own = (argument or name).split(":")[0]
    parts = [part.format(name=own) for part in source.parts]
    place = paths.place(data_dir, "data directory")
    copies = [storage.fetched(place / part, "data", needed=False) for part in parts]
    if not any(copy.exists() for copy in copies):
        raise UserError(
            f"{place} holds none of {', '.join(parts)}; {source.how_to(name, data_dir)}"
        )
    return str(storage.cached(place))


def prepare(name: str, data_dir: str | None = None) -> Dataset:
    """The data set, downloaded and prepared in `data_dir` first if tfds can do it and has not yet.

    Raises UserError: what `load` and the preparation raise, which files to put where among it.
    """
    source, argument = find_source(name)
    if data_dir:
        paths.local(data_dir, "data directory")
    as_idx = source.read is _idx_or_tfds and data_dir and idx.any_in(pathlib.Path(data_dir))
    if source.tfds and data_dir and not as_idx:
        tfds_name = argument or name
        if tfds_source.find(tfds_name, data_dir) is None:
            tfds_source.prepare(name, tfds_name, data_dir, source.manual_files)
    return load(name, data_dir)
