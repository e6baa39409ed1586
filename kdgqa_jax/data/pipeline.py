"""Batches on the host, through grain: shuffled and endless for training, in order for evaluation.

A batch is {"image": (B, H, W, C) uint8, "label": (B,) int32}; evaluation adds "mask": (B,) bool,
False for the padding of the last batch.
"""

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]


def train_iterator(
    split: Sequence[dict[str, Any]], batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """An endless iterator of shuffled batches.

    Every epoch has its own order, drawn from `seed`; batches run on across the end of an epoch, so
    that every image comes once per epoch. Each process gets its share of the same global batches.
    The position is the iterator's `get_state()`, and `set_state` restores it exactly.

    Args:
      split: random access examples.
      batch_size: of the global batch; a multiple of the number of processes.
      seed: of the order.
    """
    processes, process = jax.process_count(), jax.process_index()
    examples = grain.MapDataset.source(split).seed(seed).shuffle().repeat()
    mine = examples[process::processes] if processes > 1 else examples
    batches = mine.batch(batch_size // processes)
    # Threads prefetch; the order of the batches does not depend on them.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches.to_iter_dataset(options))


def _pad(batch: Batch, batch_size: int) -> Batch:
    count = len(batch["label"])
    padded = {
        name: np.pad(values, [(0, batch_size - count)] + [(0, 0)] * (values.ndim - 1))
        for name, values in batch.items()
    }
    return {**padded, "mask": np.arange(batch_size) < count}


def eval_batches(split: Sequence[dict[str, Any]], batch_size: int) -> Sequence[Batch]:
    """All examples once and in order; the last batch is padded with zeros and masked."""
    batches = grain.MapDataset.source(split).batch(batch_size, drop_remainder=False)
    return batches.map(lambda batch: _pad(batch, batch_size))
