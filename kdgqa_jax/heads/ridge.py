"""The solution of a refitting: ridge regression of a target on the outputs of the heads.

    D  model width    N  query heads    V  width of one value head

numpy and float64. Which layers, and what their attention should give, is in refitting.py.
"""

from typing import Any, NamedTuple

import numpy as np

from kdgqa_jax.errors import UserError


def refit_output(
    kernel: np.ndarray,
    bias: np.ndarray | None,
    inputs: np.ndarray,
    cross: np.ndarray,
    input_mean: np.ndarray,
    target_mean: np.ndarray,
    strength: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ridge regression of a target on the outputs of the heads, towards the present weights.

    Minimises `E|y - W^T a - b|^2 + r |W - W_o|^2` over W and b, where a is all heads' output before
    the output projection and y the residual update that is wanted.

    Args:
      kernel: W_o (N, V, D).
      bias: (D,); its numbers take no part: b is free. None: there is none, and moments should be
        about zero (means of zero).
      inputs: E[a a^T], (N*V, N*V).
      cross: E[a y^T], (N*V, D).
      input_mean: E[a], (N*V,).
      target_mean: E[y], (D,).
      strength: r as a share of the mean variance of a. Larger ones stay nearer to W_o.

    Returns:
      (kernel (N, V, D), bias (D,) or None) in float64.

    Raises:
      UserError: a strength that is not positive.
    """
    if not strength > 0.0:
        raise UserError(f"strength={strength} of the ridge regression must be positive")
    inputs, cross, input_mean, target_mean, old = (
        np.asarray(x, np.float64) for x in (inputs, cross, input_mean, target_mean, kernel)
    )
    size = len(input_mean)
    covariance = inputs - np.outer(input_mean, input_mean)
    wanted = cross - np.outer(input_mean, target_mean)
    ridge = strength * (np.trace(covariance) / size or 1.0)
    old = old.reshape(size, -1)
    new = np.linalg.solve(covariance + ridge * np.eye(size), wanted + ridge * old)
    offset = None if bias is None else target_mean - input_mean @ new
    return new.reshape(kernel.shape), offset


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried."""

EVERY = 5
"""One image of so many is held out while they are; then all of them solve."""

UNTRIED = 1e-3
"""The strength where there are fewer images."""


class Refit(NamedTuple):
    """What refitting made of a layer.

    Shares are of the variance of what attention should give (`FOLLOWED`; without a bias, of its
    mean square), and say what is missed.

    Attributes:
      before: share on all images with the weights as they were.
      after: share on all images, which have solved for the weights.
      strength: of the ridge.
      held_out: share on the images held out, by strength tried; {}: none was.
    """

    before: float
    after: float
    strength: float
    held_out: dict[float, float]


class Sums:
    """Batches' sums added up in float64: a the heads' outputs, y what attention should give.

    Moments are about the means where a bias can hold them, else about zero.
    """

    def __init__(self, has_bias: bool):
        self.tokens, self._sums, self._has_bias = 0.0, {}, has_bias

    def add(self, tokens: Any, input_mean: Any, target_mean: Any, **centred: Any) -> None:
        n = float(tokens)
        a, y = np.asarray(input_mean, np.float64), np.asarray(target_mean, np.float64)
        products = {"inputs": np.outer(a, a), "cross": np.outer(a, y), "target": y * y}
        sums = {name: centred[name] + n * product for name, product in products.items()}
        about = n if self._has_bias else 0.0
        sums |= {"input_mean": about * a, "target_mean": about * y}
        self._sums = {name: self._sums.get(name, 0.0) + x for name, x in sums.items()}
        self.tokens += n

    def __add__(self, other: "Sums") -> "Sums":
        both = Sums(self._has_bias)
        both._sums = {name: x + other._sums[name] for name, x in self._sums.items()}
        both.tokens = self.tokens + other.tokens
        return both

    def _mean(self, name: str) -> np.ndarray:
        return self._sums[name] / self.tokens

    def solve(self, projection: dict[str, np.ndarray], strength: float) -> dict[str, np.ndarray]:
        names = ("inputs", "cross", "input_mean", "target_mean")
        moments = (self._mean(name) for name in names)
        kernel, bias = refit_output(
            projection["kernel"], projection.get("bias"), *moments, strength
        )
        return {"kernel": kernel} | ({} if bias is None else {"bias": bias})

    def missed(self, projection: dict[str, np.ndarray]) -> float:
        """`E|y - W^T a - b|^2` as a share of the variance of y."""
        a, y = self._mean("input_mean"), self._mean("target_mean")
        kernel = projection["kernel"].reshape(len(a), -1)
        covariance = self._mean("inputs") - np.outer(a, a)
        cross = self._mean("cross") - np.outer(a, y)
        variance = float(np.sum(self._mean("target") - y * y))
        offset = y - a @ kernel - projection.get("bias", 0.0)
        error = np.sum(kernel * (covariance @ kernel - 2.0 * cross)) + np.sum(offset**2)
        return float(max(variance + error, 0.0) / variance) if variance > 0.0 else 0.0


def solve(
    folded: dict[str, np.ndarray], seen: Sums, held: Sums, strength: float | None
) -> tuple[dict[str, np.ndarray], Refit]:
    """The projection that all images solve for, its ridge by those held out.

    Args:
      folded: the projection as it is, kernel (N, V, D) and bias (D,) if there is one, with
        LayerScale in it.
      seen: sums over the images that the strengths are tried with.
      held: over those that judge them; none: `strength`, or `UNTRIED`.
      strength: of the ridge, where no image is held out.
    """
    tried = {}
    if held.tokens:
        tried = {s: held.missed(seen.solve(folded, s)) for s in STRENGTHS}
        strength = min(tried, key=tried.get)
    strength = UNTRIED if strength is None else strength
    sums = seen + held
    solved = sums.solve(folded, strength)
    return solved, Refit(sums.missed(folded), sums.missed(solved), strength, tried)
