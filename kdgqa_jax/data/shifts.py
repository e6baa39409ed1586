"""Shifted versions of data sets: fixed changes of every image, to fine-tune on."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.data.dataset import listing

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
    shift: str

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.split[index]
        return {**item, "image": np.ascontiguousarray(SHIFTS[self.shift](item["image"]))}

    def listing(self) -> Iterator[bytes]:
        """That of the split: see `dataset`."""
        return listing(self.split)
