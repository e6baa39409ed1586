"""Less data, or worse: a share of the images, and labels that are wrong, both drawn by a seed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from kdgqa_jax.data import sources
from kdgqa_jax.data.dataset import Dataset, Split, listing
from kdgqa_jax.errors import UserError, check_rate

TEST_SEED = 0
"""Of the share of the test images, which is the same for every run."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Some examples of a split, in the order of `indices`.

    Attributes:
      split: the whole.
      indices: (n,) int64, positions in the whole.
      offsets: (n,) int32 that are added to the labels, modulo the number of classes; 0: right ones.
      num_classes: of the labels.
    """

    split: Split
    indices: np.ndarray
    offsets: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices)

    def _label(self, index: int, label: np.int32) -> np.int32:
        return np.int32((label + self.offsets[index]) % self.num_classes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.split[int(self.indices[index])]
        return {**item, "label": self._label(index, item["label"])}

    def listing(self) -> Iterator[bytes]:
        """What was drawn, then the whole: see `dataset`."""
        yield self.indices.astype("<i8").tobytes()
        yield self.offsets.astype("<i4").tobytes()
        yield from listing(self.split)


@dataclasses.dataclass(frozen=True)
class _DrawnFiles(Drawn):
    """Of a split of compressed images."""

    def open(self, index: int) -> tuple[Any, np.int32]:
        """(PIL image, label): see `dataset.Split`."""
        image, label = self.split.open(int(self.indices[index]))
        return image, self._label(index, label)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for shares out of range, of `config.data`."""
    for name in ("train_share", "test_share"):
        if not 0.0 < config[name] <= 1.0:
            raise UserError(f"data.{name}={config[name]} must be above 0, at most 1")
    check_rate("data.label_noise", config.label_noise)


def size(images: int, share: float) -> int:
    """How many images a share of so many has: at least one."""
    return max(round(share * images), 1)


def load(config: ml_collections.ConfigDict, seed: int, dataset: Dataset | None = None) -> Dataset:
    """The data set of a run: that of `sources.load`, or the part that the config asks for.

    The training images of a share come in the order in which they were drawn; those of a smaller
    share are the first ones of a larger. A wrong label is any of the other classes, each as likely.

    Args:
      config: the fields of `config.data`.
      seed: of the run; the test images of a share are the same for all seeds.
      dataset: taken instead of the one that the config names.

    Raises:
      UserError: what `sources.load` raises, or shares out of range.
    """
    check(config)
    if dataset is None:
        dataset = sources.load(config.name, config.data_dir, config.shift)
    else:
        dataset = sources.shifted(dataset, config.shift)
    classes = len(dataset.class_names)
    if config.label_noise and classes < 2:
        raise UserError(f"data.label_noise needs two classes or more; {dataset.name} has {classes}")
    train = _draw(dataset.train, config.train_share, config.label_noise, classes, seed)
    test = _draw(dataset.test, config.test_share, 0.0, classes, TEST_SEED)
    return dataclasses.replace(dataset, train=train, test=test)


def _draw(split: Split, share: float, noise: float, num_classes: int, seed: int) -> Split:
    if share == 1.0 and not noise:
        return split
    # RandomState's stream is the same in all releases of NumPy. One for each purpose, so that the
    # images of a share are the same with and without noise.
    order = np.arange(len(split))
    if share < 1.0:
        order = np.random.RandomState((seed, 1)).permutation(len(split))
    offsets = np.zeros(len(split), np.int32)
    rng = np.random.RandomState((seed, 2))
    wrong = rng.permutation(len(split))[: round(noise * len(split))]
    offsets[wrong] = rng.randint(1, max(num_classes, 2), len(wrong))
    chosen = order[: size(len(split), share)]
    kind = _DrawnFiles if hasattr(split, "open") else Drawn
    return kind(split, chosen, offsets[chosen], num_classes)
