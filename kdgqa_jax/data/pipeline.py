"""Batches on the host, through grain: shuffled and endless for training, in order for evaluation.

A batch is {"image": (B, H, W, C) uint8, "label": (B,) int32}; evaluation adds "mask": (B,) bool,
False for the padding of the last batch. Splits that skip what they cannot read add "corrupt": (B,)
bool.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from PIL import Image

from kdgqa_jax import sharding
from kdgqa_jax.data.images import Preprocessing, to_array
from kdgqa_jax.data.sources import Dataset
from kdgqa_jax.errors import UserError

Batch = dict[str, np.ndarray]
Split = Sequence[dict[str, Any]]

ON_DEVICE_LIMIT = 8 * 2**30  # bytes
EPOCHS = 10**6  # as good as endless


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A split whose images have one shape.

    Attributes:
      split: random access examples, images of any size.
      shape: (height, width) wanted.
      preprocessing: how to get there.
      skip_corrupt: an example that cannot be read is replaced by the next one that can, and marked
        in "corrupt"; otherwise its error is raised.
    """

    split: Split
    shape: tuple[int, int]
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    skip_corrupt: bool = False

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.skip_corrupt:
            return self._item(index)
        for attempt in range(len(self)):
            try:
                item = self._item((index + attempt) % len(self))
            except UserError:
                continue
            return {**item, "corrupt": np.bool_(attempt > 0)}
        raise UserError("no image of the split can be read")

    def _item(self, index: int) -> dict[str, Any]:
        if hasattr(self.split, "open"):
            image, label = self.split.open(index)
            item = {"label": label}
        else:
            item = self.split[index]
            if item["image"].shape[:2] == self.shape:
                return item
            pixels = item["image"]
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if (image.height, image.width) != self.shape:
            image = self.preprocessing.resized(image, self.shape)
        return {**item, "image": to_array(image)}


def statistics(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """(mean, std) of `config.data`, hashable."""
    frozen = ml_collections.FrozenConfigDict({"mean": config.mean, "std": config.std})
    return frozen.mean, frozen.std


PREPROCESSING = tuple(field.name for field in dataclasses.fields(Preprocessing))


def prepare(
    dataset: Dataset, image_shape: tuple[int, int], config: ml_collections.ConfigDict
) -> Dataset:
    """A data set whose images have one shape, the one in which hosts ship them.

    That is the model's (height, width), but images that are all of one smaller size stay as they
    are: the device augments them and makes them larger.

    Args:
      dataset: as a source gives it.
      image_shape: (height, width) of the model.
      config: the fields of `config.data`.

    Raises UserError: statistics for another number of channels.
    """
    preprocessing = Preprocessing(**{name: config[name] for name in PREPROCESSING})
    channels = dataset.image_shape[-1]
    for name in ("mean", "std"):
        if np.size(config[name]) not in (1, channels):
            raise UserError(
                f"data.{name}={config[name]} has {np.size(config[name])} numbers; expected one, or"
                f" one for each of the {channels} channels of {dataset.name}"
            )
    native = dataset.native_size
    small = native is not None and native[0] <= image_shape[0] and native[1] <= image_shape[1]
    shape = native[:2] if small and config.crop_share == 1.0 else image_shape

    def prepared(split: Split) -> Prepared:
        return Prepared(split, tuple(shape), preprocessing, config.skip_corrupt)

    train, test = prepared(dataset.train), prepared(dataset.test)
    size = (*train.shape, channels)
    return dataclasses.replace(dataset, train=train, test=test, native_size=size)


def _stack(items: Sequence[dict[str, Any]]) -> Batch:
    return {name: np.stack([item[name] for item in items]) for name in items[0]}


@dataclasses.dataclass(frozen=True)
class _Batches:
    """This process's part of global batches, each read as a whole, without grain's work per image.

    Attributes:
      examples: in the order of the global batches.
      batch_size: of a global batch.
      rows: those of every global batch that are this process's.
    """

    examples: Split
    batch_size: int
    rows: range

    def __len__(self) -> int:
        return len(self.examples) // self.batch_size

    def __getitem__(self, batch: int) -> Batch:
        first = batch * self.batch_size
        return _stack([self.examples[first + row] for row in self.rows])


def _batches(examples: Split, batch_size: int) -> grain.MapDataset:
    """Every process gets one block of every batch."""
    share, process = batch_size // jax.process_count(), jax.process_index()
    rows = range(process * share, (process + 1) * share)
    return grain.MapDataset.source(_Batches(examples, batch_size, rows))


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """Examples for any number of epochs: every one once per epoch, each time in another order."""

    split: Split
    seed: int

    def __len__(self) -> int:
        return EPOCHS * len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        epoch, position = divmod(row, len(self.split))
        return self.split[int(_order(len(self.split), self.seed, epoch)[position])]


@functools.lru_cache(maxsize=2)  # a batch may begin the next epoch
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState's stream is the same in all releases of NumPy: a run can be resumed years later.
    return np.random.RandomState((seed, epoch)).permutation(count).astype(np.uint32)


class TrainBatches(Iterator[Batch]):
    """An endless iterator of shuffled batches; its position is the number of batches taken.

    Every epoch has its own order, drawn from `seed`; batches run on across the end of an epoch, so
    that every image comes once per epoch. Each process gets its share of the same global batches.
    The batches are the same for any number of workers.

    Args:
      split: random access examples.
      batch_size: of the global batch; a multiple of the number of processes.
      seed: of the order.
      workers: processes that read ahead; 0: threads of this one.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, workers: int = 0):
        self._batches = _batches(_Shuffled(split, seed), batch_size)
        self._workers = workers
        self._position, self._iterator = 0, None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self._position += 1
        return batch

    def _start(self) -> Iterator[Batch]:
        ahead = self._batches[self._position :]
        # Threads prefetch; the order of the batches does not depend on them. A worker has one: two
        # would wait for each other's Python.
        options = grain.ReadOptions(
            num_threads=1 if self._workers else 2, prefetch_buffer_size=2 if self._workers else 8
        )
        dataset = ahead.to_iter_dataset(options)
        if self._workers:
            _parse_flags()
            processes = grain.multiprocessing.MultiprocessingOptions(num_workers=self._workers)
            dataset = dataset.mp_prefetch(processes, _end_with_parent)
        return iter(dataset)

    def get_state(self) -> dict[str, int]:
        """The position, as JSON."""
        return {"batches": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a position that `get_state` gave."""
        self.close()
        self._position = state["batches"]

    def close(self) -> None:
        """Stop what reads ahead; a next batch starts it again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def _end_with_parent(worker: int, workers: int) -> None:
    """In a worker: leave when the run's process is gone, also one that was killed.

    grain's workers would otherwise wait for minutes for somebody to take their batches.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _parse_flags() -> None:
    """grain's workers read absl flags, which nobody has parsed outside of `absl.app`."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass(frozen=True)
class _Indices:
    """A split of positions alone."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": np.int32(index)}


def check_on_device(split: Split) -> None:
    """Raise UserError for a split too large to lie in the memory of every device."""
    size = len(split) * split[0]["image"].nbytes
    if size > ON_DEVICE_LIMIT:
        raise UserError(
            f"data.on_device: {len(split)} images need {size / 2**30:.1f} GiB of every device, more"
            f" than {ON_DEVICE_LIMIT / 2**30:.0f} GiB; leave the data on the host"
        )


def train_source(
    split: Split,
    batch_size: int,
    seed: int,
    mesh: jax.sharding.Mesh,
    workers: int = 0,
    on_device: bool = False,
) -> tuple[TrainBatches, Callable[[Batch], dict[str, jax.Array]]]:
    """(batches on the host, function that makes global device arrays of one).

    With `on_device` the whole split lies in the memory of every device and the host sends positions
    only; the batches are the same.

    Raises UserError: a split too large for `on_device`.
    """
    if workers < 0:
        raise UserError(f"data.workers={workers} must not be negative; 0: threads of this process")
    if not on_device:
        batches = TrainBatches(split, batch_size, seed, workers)
        return batches, lambda batch: sharding.put_batch(batch, mesh)
    check_on_device(split)
    whole = _stack([split[i] for i in range(len(split))])
    whole = jax.device_put(whole, sharding.replicated(mesh))
    split_sharding = sharding.batch_sharded(mesh)

    @jax.jit
    def take(whole: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
        batch = {name: x[index] for name, x in whole.items()}
        return jax.lax.with_sharding_constraint(batch, split_sharding)

    def fetch(batch: Batch) -> dict[str, jax.Array]:
        return take(whole, sharding.put_batch(batch, mesh)["index"])

    return TrainBatches(_Indices(len(split)), batch_size, seed), fetch


@dataclasses.dataclass(frozen=True)
class _Padded:
    """Every example once and in order, then padding up to a whole number of batches."""

    split: Split
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size) * self.batch_size

    @functools.cached_property
    def _padding(self) -> dict[str, Any]:
        return {name: np.zeros_like(x) for name, x in self.split[0].items()}

    def __getitem__(self, row: int) -> dict[str, Any]:
        real = row < len(self.split)
        item = dict(self.split[row] if real else self._padding)
        corrupt = item.pop("corrupt", False)
        return {**item, "mask": np.bool_(real and not corrupt)}


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """All examples once and in order; the last batch is padded with zeros and masked.

    Each process gets its rows of the same global batches. One thread per core reads ahead, each by
    one batch.
    """
    batches = _batches(_Padded(split, batch_size), batch_size)
    threads = min(os.cpu_count() or 2, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    with contextlib.closing(iter(batches.to_iter_dataset(options))) as iterator:
        yield from iterator
