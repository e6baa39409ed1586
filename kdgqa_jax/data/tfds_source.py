"""Data sets that tensorflow-datasets has prepared as ArrayRecord files, read without TensorFlow.

DIR/NAME[/CONFIG]/VERSION is read from its own description, so that reading needs neither the code
of the data set nor the network. Only `prepare` downloads, and only it needs TensorFlow.
"""

import difflib
import io
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdgqa_jax import extras
from kdgqa_jax.data import images
from kdgqa_jax.data.dataset import Dataset
from kdgqa_jax.errors import UserError, one_line

_NAME = re.compile(r"([a-z]\w*)(?:/([\w.\-]+))?(?::(\d+\.\d+\.\d+))?", re.IGNORECASE)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_TEST_SPLITS = ("test", "validation", "valid", "val")
_ANEW = "delete the folder and run `kdgqa prepare` again"
MANUAL_DIR = "downloads/manual"  # below the data directory, where tfds looks


def _one_line(text: object, length: int = 300) -> str:
    line = one_line(text, None)
    return line if len(line) <= length else line[:length] + "..."


# --- Finding ------------------------------------------------------------------------------------


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in a folder, if it is there. Raises UserError if it cannot be listed."""
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    except PermissionError as error:
        raise UserError(
            f"{error.filename} cannot be read ({error.strerror}); check its permissions"
        ) from None


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
    """Version folders, oldest first; those that tfds has not finished have other names."""
    found = [p for p in _folders(folder) if _VERSION.fullmatch(p.name)]
    return sorted(found, key=lambda p: tuple(map(int, p.name.split("."))))


def find(name: str, data_dir: str) -> pathlib.Path | None:
    """The prepared directory of NAME[/CONFIG][:VERSION], the newest by default; None: none there.

    Raises UserError: a name of another form, or several configs of which none is named.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(
            f"tfds data set {name!r} must have the form NAME, NAME:1.2.3 or NAME/CONFIG:1.2.3"
        )
    base, config, version = match.groups()
    folder = pathlib.Path(data_dir, base, config or "")
    if not config and not _versions(folder):
        configs = [p for p in _folders(folder) if _versions(p)]
        if len(configs) > 1:
            names = ", ".join(f"{base}/{p.name}" for p in configs)
            raise UserError(f"{folder} holds several configs; name one of them: {names}")
        folder = configs[0] if configs else folder
    there = [p for p in _versions(folder) if version in (None, p.name)]
    return there[-1] if there else None


# --- Reading ------------------------------------------------------------------------------------


class TfdsSplit:
    """A split of a prepared directory; a record is read when its image is asked for.

    Pickles as what it was made from, and opens the files again where it is unpickled.

    Args:
      directory: a folder of one version.
      split: its name there.
      keys: of the image and of the label in a record.

    Raises:
      UserError: the directory is damaged, has no such split, or another kind of records; on
        access, a record or image that is damaged or a label out of range.
    """

    def __init__(self, directory: str, split: str, keys: tuple[str, str]):
        from tensorflow_datasets.proto import tf_example_pb2

        self.directory, self.split, self.keys = directory, split, keys
        self._example = tf_example_pb2.Example
        builder = _open_builder(directory)
        features = builder.info.features
        self._channels = 1 if features[keys[0]].shape[-1] == 1 else 3
        self._num_classes = features[keys[1]].num_classes
        if split not in builder.info.splits:
            raise UserError(
                f"{directory} has no split {split!r}, only {', '.join(builder.info.splits)}"
            )
        # Nothing is decoded by tfds: it does so differently with OpenCV and without, would decode
        # the segmentation masks of the pets too, and takes as long as PIL for a small image.
        try:
            self._records = builder.as_data_source(split).data_source
        except NotImplementedError:
            raise UserError(
                f"{directory} is prepared as {builder.info.file_format.value}, which has no random"
                " access; prepare it as array_record in another --data-dir with `kdgqa prepare`"
            ) from None
        info = builder.info.splits[split]  # of the format that was chosen just now
        self._length = info.num_examples
        self._files = [os.fspath(path) for path in info.filepaths]
        self._ends = np.cumsum(info.shard_lengths)  # of the records in each file
        missing = [path for path in self._files if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{missing[0]} not found; {_ANEW}")

    def __reduce__(self):
        return TfdsSplit, (self.directory, self.split, self.keys)

    def __repr__(self) -> str:
        return f"TfdsSplit({self.directory!r}, {self.split!r})"

    def __len__(self) -> int:
        return self._length

    def listing(self) -> Iterator[bytes]:
        """Files with the end of each in the split: see `dataset`."""
        for path, end in zip(self._files, self._ends.tolist(), strict=True):
            yield f"{os.path.basename(path)}\0{end}\0".encode()

    def encoded(self, index: int) -> bytes:
        """The image as it is stored: see `dataset.Split`."""
        features = self._example.FromString(self._records[index]).features.feature
        return features[self.keys[0]].bytes_list.value[0]

    def open(self, index: int) -> tuple[Any, np.int32]:
        """(PIL image, label): see `dataset.Split`."""
        index = range(self._length)[index]  # IndexError past the end
        place = _Place(self, index)
        try:
            features = self._example.FromString(self._records[index]).features.feature
            encoded = features[self.keys[0]].bytes_list.value[0]
            label = features[self.keys[1]].int64_list.value[0]
        except Exception as error:
            raise UserError(f"{place} cannot be read ({_one_line(error)}); {_ANEW}") from None
        if not 0 <= label < self._num_classes:
            raise UserError(
                f"{place}: label {label} is out of range for {self._num_classes} classes"
            )
        return images.opened(io.BytesIO(encoded), place, self._channels), np.int32(label)

    def describe(self, index: int) -> str:
        """Where a record lies, for the user."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._files[file]}: record {index} of split {self.split!r}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.open(index)
        return {"image": images.to_array(image), "label": label}


class _Place(NamedTuple):
    """Names a record once somebody asks; that takes as long as reading a small one."""

    split: TfdsSplit
    index: int

    def __str__(self) -> str:
        return self.split.describe(self.index)


def _open_builder(directory: str) -> Any:
    """The tfds builder of a version folder. Raises UserError if its description is damaged."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # missing files, no JSON, features of other releases
        raise UserError(
            f"{directory} is not a prepared tfds data set ({_one_line(error)}); {_ANEW}"
        ) from None


def _keys(builder: Any, directory: pathlib.Path) -> tuple[str, str]:
    """Which features of a record are the image and the label."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    keys = builder.info.supervised_keys
    if not keys or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
        keys = ("image", "label")
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if not all(
        k in features and isinstance(features[k], t) for k, t in zip(keys, kinds, strict=True)
    ):
        raise UserError(
            f"{directory} holds no image with a class label (features: {', '.join(features)});"
            " choose a data set for classification"
        )
    image = features[keys[0]]
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, 4, None):
        raise UserError(
            f"{directory}: images are {image.np_dtype} {image.shape}; expected uint8 with 1, 3 or"
            " 4 channels"
        )
    return keys


def read(
    name: str,
    tfds_name: str,
    data_dir: str,
    how: str,
    splits: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> Dataset:
    """A data set that is prepared in `data_dir`; nothing is downloaded, or written there.

    Args:
      name: for the user.
      tfds_name: NAME[/CONFIG][:VERSION].
      data_dir: where tfds has put it.
      how: says how to prepare it.
      splits: names of the splits to train and to test on; None: train, and test or validation.
      num_classes: how many there must be; None: any number.

    Raises:
      UserError: not prepared there, damaged, or not for classification of images.
    """
    directory = find(tfds_name, data_dir)
    if directory is None:
        raise UserError(f"data set {name!r} is not prepared in {data_dir}; {how}")
    builder = _open_builder(str(directory))
    keys = _keys(builder, directory)
    image, label = (builder.info.features[key] for key in keys)
    if num_classes not in (None, label.num_classes):
        raise UserError(
            f"{directory} holds {label.num_classes} classes where {name} has {num_classes}; choose"
            " another --data-dir"
        )
    if splits is None:
        there = builder.info.splits
        test = next((split for split in _TEST_SPLITS if split in there), None)
        if "train" not in there or test is None:
            raise UserError(
                f"{directory} has the splits {', '.join(there)}; expected train, and one of"
                f" {', '.join(_TEST_SPLITS)}"
            )
        splits = ("train", test)
    train, test = (TfdsSplit(str(directory), split, keys) for split in splits)
    native_size = None
    if None not in image.shape:
        native_size = (*image.shape[:2], 1 if image.shape[-1] == 1 else 3)
    return Dataset(name, tuple(label.names), train, test, native_size)


# --- Preparing ----------------------------------------------------------------------------------


def prepare(name: str, tfds_name: str, data_dir: str, manual_files: Sequence[str] = ()) -> None:
    """Download a data set and write it below `data_dir` as ArrayRecord files, with TensorFlow.

    Args:
      name: for the user.
      tfds_name: NAME[/CONFIG][:VERSION].
      data_dir: of tfds.
      manual_files: files that the user has to put into `MANUAL_DIR` first.

    Raises:
      UserError: TensorFlow or a file is missing, no such data set, or the download failed.
    """
    manual = pathlib.Path(data_dir, MANUAL_DIR)
    missing = [file for file in manual_files if not (manual / file).is_file()]
    if missing:
        raise UserError(
            f"data set {name!r} cannot be downloaded by a program: put {' and '.join(missing)}"
            f" into {manual}, then run this again"
        )
    extras.needs("tensorflow", f"preparing data set {name!r}, which is done once,")
    import tensorflow_datasets as tfds

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # ten retries for each file
    try:
        builder = tfds.builder(
            tfds_name, data_dir=data_dir, file_format="array_record", try_gcs=False
        )
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(tfds_name, _known_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"tensorflow-datasets has no data set {tfds_name!r}{hint}") from None
    except Exception as error:
        raise UserError(f"data set {name!r}: {_one_line(error)}") from None
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if by_hand and not (manual.is_dir() and any(manual.iterdir())):
        raise UserError(
            f"data set {name!r} cannot be downloaded by a program: put its files into {manual}:"
            f" {_one_line(by_hand, 1000)}"
        )
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise UserError(
            f"data set {name!r} could not be prepared in {data_dir} ({reason}); check the network"
            " and the space there, then run this again"
        ) from None


def _known_names() -> list[str]:
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)
