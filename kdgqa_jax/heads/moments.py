"""Moments of a layer's input: all that merging of heads has to know about data.

D is the model width. numpy and float64.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass
class InputMoments:
    """Sums over the tokens of a layer's input (after its norm), from which all moments follow.

    Sums of several batches add up. Centring comes before squaring, and what depends on the mean is
    a sum over images, so that a large mean costs no digits.

    Attributes:
      tokens: how many there were.
      total: (D,) sum of x.
      within: (D, D) sum of (x - m)(x - m)^T, m the mean over the tokens of the same image.
      between: (D, D) sum of m m^T.
    """

    tokens: float
    total: np.ndarray
    within: np.ndarray
    between: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "InputMoments":
        """No tokens yet."""
        return cls(0.0, np.zeros(width), np.zeros((width, width)), np.zeros((width, width)))

    @classmethod
    def of(cls, x: np.ndarray, mask: np.ndarray | None = None) -> "InputMoments":
        """Of an input (B, T, D); mask (B, T) bool is False for padded tokens."""
        x = np.asarray(x, np.float64)
        mask = np.ones(x.shape[:2], bool) if mask is None else np.asarray(mask, bool)
        tokens, there = mask.sum(axis=1), mask[..., None]
        x = np.where(there, x, 0.0)  # padding may hold anything
        means = x.sum(axis=1) / np.maximum(tokens, 1)[:, None]
        centred = np.where(there, x - means[:, None], 0.0).reshape(-1, x.shape[-1])
        moments = cls.empty(x.shape[-1])
        moments.add_images(tokens, means, centred.T @ centred)
        return moments

    def add_images(self, tokens: np.ndarray, means: np.ndarray, within: np.ndarray) -> None:
        """Add images: their numbers of tokens (B,), mean tokens (B, D) and sum `within`, in place.

        Images with 0 tokens count for nothing.
        """
        tokens, means = np.asarray(tokens, np.float64), np.asarray(means, np.float64)
        weighted = means * tokens[:, None]
        self.tokens += float(tokens.sum())
        self.total += weighted.sum(axis=0)
        self.within += within
        self.between += means.T @ weighted

    def __add__(self, other: "InputMoments") -> "InputMoments":
        fields = (field.name for field in dataclasses.fields(self))
        return InputMoments(*(getattr(self, name) + getattr(other, name) for name in fields))

    @property
    def mean(self) -> np.ndarray:
        """E[x], (D,)."""
        return self.total / self.tokens

    @property
    def centred(self) -> np.ndarray:
        """E[(x - m)(x - m)^T], m the mean over the tokens of the same image: (D, D)."""
        return self.within / self.tokens

    @property
    def covariance(self) -> np.ndarray:
        """Of x over all tokens of all images, (D, D)."""
        return (self.within + self.between) / self.tokens - np.outer(self.mean, self.mean)

    @property
    def second(self) -> np.ndarray:
        """E[x x^T], (D, D)."""
        return (self.within + self.between) / self.tokens


def data_free_moments(scale: np.ndarray, bias: np.ndarray | None = None) -> InputMoments:
    """Moments without data: what a LayerNorm (D,), (D,), or an RMSNorm (D,), gives.

    Taken as x = scale * u + bias, with the entries of u uncorrelated, of mean zero and unit
    variance, and independent between the tokens of an image.
    """
    scale = np.asarray(scale, np.float64)
    bias = np.zeros_like(scale) if bias is None else np.asarray(bias, np.float64)
    return InputMoments(1.0, bias, np.diag(scale**2), np.outer(bias, bias))


def data_free_by_layer(params: Mapping[str, Any]) -> dict[str, InputMoments]:
    """Moments without data by layer name: of what the first norm of each block gives.

    Args:
      params: of a ViT whose attention sees that, layers not stacked.
    """
    names = (name for name in params if name.startswith("blocks_"))
    return {name: data_free_moments(**params[name]["norm1"]) for name in names}
