"""Grouping rules: how a layer shares its query heads among its key/value heads.

    B  batch             T  query tokens        S  key/value tokens (S == T in self-attention)
    N  query heads       K  key/value heads     H  width of one head

A rule is a small frozen object. It holds its own options, checks them, and says how its memory
starts, how key/value heads are scored, which allocation follows, and what is remembered. The
module in attention.py does the rest; everything else asks the rule, never for its name. To add
one, write a subclass of `Rule` and give it a name with `attention.register`.

Source: "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", arXiv 2408.08454,
sections on KDGQA and DGQA, and the authors' released code; docs/method.md says where they differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kdgqa_jax import allocation as alloc
from kdgqa_jax import options
from kdgqa_jax.errors import UserError
from kdgqa_jax.options import option

Array = jax.Array
Memory = dict[str, Array]
"""What the collection `norm_stats` holds for one layer; {}: nothing."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What every rule is asked. A subclass overrides what differs; all of it is traced by `jit`.

    Options are fields made by `options.option`. Arrays have static shapes.
    """

    dynamic: ClassVar[bool] = True
    """Groups can be others than the equal ones."""

    def __post_init__(self) -> None:
        options.check(self)

    @property
    def by_batch(self) -> bool:
        """One allocation for all images of a batch, which depends on them."""
        return self.dynamic

    @property
    def measure(self) -> str:
        """What is scored: conversion keeps the memory of rules that measure the same."""
        return type(self).__name__

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise UserError for options that do not fit N and K."""

    def memory(self, num_heads: int, num_kv_heads: int) -> Memory:
        """The memory as it starts. An entry `allocation` is (K,) int32 with sum N."""
        return {}

    def scores(self, query: Array, key: Array, memory: Memory, mask: Array | None) -> Array:
        """The scores of the key/value heads: (K,), or (B, K) to allocate image by image; float32.

        Args:
          query: BTNH.
          key: BSKH.
          memory: of the layer.
          mask: (B,) bool, False for padded images, which must not count. None: all are real.
        """
        return alloc.key_head_norms(key, mask)

    def allocate(self, scores: Array, memory: Memory, num_heads: int) -> Array:
        """The allocation: (K,) int32 with sum N, or (B, K). In training `memory` is the new one."""
        raise NotImplementedError(f"{type(self).__name__} needs a method allocate")

    def due(self, step: Array | int | None) -> Array | bool:
        """If the memory is updated in training step `step`, the global optimizer step.

        A rule that says anything but True has a `fixed_allocation`, which serves in between.
        """
        return True

    def update(self, scores: Array, memory: Memory, num_heads: int) -> Memory:
        """The memory after a training step; called in every step, used where it is `due`."""
        return memory

    def learn(self, memory: Memory, grads: Mapping[str, Any]) -> Memory:
        """The memory after an update, by the gradients of the layer's parameters.

        `grads` has the layout of the parameters: "key", "kernel" DKH and so on.
        """
        return memory

    def fixed_allocation(self, memory: Memory, num_heads: int, num_kv_heads: int) -> Array | None:
        """The allocation of every evaluation, (K,) int32; None where images decide about it."""
        return None


@dataclasses.dataclass(frozen=True)
class Equal(Rule):
    """Equal groups, always: MHA, GQA and PGQA."""

    dynamic: ClassVar[bool] = False

    def fixed_allocation(self, memory: Memory, num_heads: int, num_kv_heads: int) -> Array:
        """N // K each."""
        return alloc.equal_allocation(num_heads, num_kv_heads)


# --- importance of a key head -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _OfKeys:
    """A function of the keys, a name in `allocation.IMPORTANCE`."""

    name: str
    by_images: ClassVar[bool] = True

    def memory(self, num_kv_heads: int) -> Memory:
        return {}

    def scores(self, key: Array, memory: Memory, mask: Array | None, per_example: bool) -> Array:
        return alloc.key_head_norms(key, mask, per_example=per_example, importance=self.name)

    def learn(self, memory: Memory, grads: Mapping[str, Any]) -> Memory:
        return memory


class _OfGradients:
    """The Frobenius norm of the last update's gradient on the projection of the key head."""

    by_images: ClassVar[bool] = False

    def memory(self, num_kv_heads: int) -> Memory:
        return {"key_gradient": jnp.zeros(num_kv_heads, jnp.float32)}

    def scores(self, key: Array, memory: Memory, mask: Array | None, per_example: bool) -> Array:
        return memory["key_gradient"]

    def learn(self, memory: Memory, grads: Mapping[str, Any]) -> Memory:
        # Kernel DKH and bias KH: all axes but that of the heads.
        squares = [
            jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple({*range(x.ndim)} - {x.ndim - 2}))
            for x in grads["key"].values()
        ]
        return {**memory, "key_gradient": jnp.sqrt(sum(squares))}


IMPORTANCE = {name: _OfKeys(name) for name in alloc.IMPORTANCE} | {"gradient": _OfGradients()}
"""What makes a key head important, by name."""


# --- the rules of the paper ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ByImportance(Rule):
    """A rule that scores key heads by one of `IMPORTANCE`.

    Attributes:
      importance: score of a key head.
      min_heads_per_group: least number of query heads of each key/value head; 0 as published.
    """

    importance: str = option("l2", choices=IMPORTANCE)
    min_heads_per_group: int = option(0)

    @property
    def measure(self) -> str:
        return self.importance

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        if not 0 <= self.min_heads_per_group * num_kv_heads <= num_heads:
            raise UserError(
                f"min_heads_per_group={self.min_heads_per_group} for {num_kv_heads} key/value heads"
                f" must be between 0 and {num_heads // num_kv_heads}, so that"
                f" {num_heads} query heads suffice"
            )

    def memory(self, num_heads: int, num_kv_heads: int) -> Memory:
        return IMPORTANCE[self.importance].memory(num_kv_heads)

    def scores(self, query: Array, key: Array, memory: Memory, mask: Array | None) -> Array:
        return IMPORTANCE[self.importance].scores(key, memory, mask, not self.by_batch)

    def learn(self, memory: Memory, grads: Mapping[str, Any]) -> Memory:
        return IMPORTANCE[self.importance].learn(memory, grads)


@dataclasses.dataclass(frozen=True)
class KDGQA(_ByImportance):
    """Key-driven: the allocation follows the scores of now, in training and evaluation.

    Attributes:
      allocation_scope: "batch" (as published: one allocation from the scores of the batch) or
        "example" (each image by its own: its output does not depend on its batch mates).
    """

    allocation_scope: str = option("batch", choices=("batch", "example"))

    @property
    def by_batch(self) -> bool:
        return self.allocation_scope == "batch"

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        super().check(num_heads, num_kv_heads)
        if not self.by_batch and not IMPORTANCE[self.importance].by_images:
            raise UserError(
                f"importance {self.importance!r} is one score per layer: use allocation_scope"
                " 'batch'"
            )

    def allocate(self, scores: Array, memory: Memory, num_heads: int) -> Array:
        return alloc.kdgqa_allocation(scores, num_heads, self.min_heads_per_group)

    def fixed_allocation(self, memory: Memory, num_heads: int, num_kv_heads: int) -> Array | None:
        importance = IMPORTANCE[self.importance]
        if importance.by_images:
            return None
        scores = importance.scores(jnp.empty(0), memory, None, False)  # which no keys decide
        return self.allocate(scores, memory, num_heads)


def _check_window(name: str, window: int) -> None:
    if window < 1:
        raise UserError(f"{name}={window} must be a number of steps, at least 1")


@dataclasses.dataclass(frozen=True)
class _Dynamic(_ByImportance):
    """DGQA: scores are remembered; the allocation changes in some training steps only.

    Memory: `key_norm` (K,) float32, `allocation` (K,) int32.

    Attributes:
      window: the allocation is recomputed in training steps with step % window == 0.
    """

    window: int = option(300, check=_check_window)

    def apportion(self, scores: Array, cache: Array, num_heads: int) -> tuple[Array, Array]:
        """(allocation, new cache)."""
        raise NotImplementedError

    def memory(self, num_heads: int, num_kv_heads: int) -> Memory:
        return {
            **super().memory(num_heads, num_kv_heads),
            "key_norm": jnp.zeros(num_kv_heads, jnp.float32),
            "allocation": alloc.equal_allocation(num_heads, num_kv_heads),
        }

    def due(self, step: Array | int | None) -> Array | bool:
        if step is None:
            raise ValueError(
                f"{type(self).__name__} in training needs step=..., the global optimizer step"
            )
        return step % self.window == 0

    def update(self, scores: Array, memory: Memory, num_heads: int) -> Memory:
        allocation, key_norm = self.apportion(scores, memory["key_norm"], num_heads)
        return {**memory, "key_norm": key_norm, "allocation": allocation}

    def allocate(self, scores: Array, memory: Memory, num_heads: int) -> Array:
        return memory["allocation"]

    def fixed_allocation(self, memory: Memory, num_heads: int, num_kv_heads: int) -> Array:
        return memory["allocation"]


def _check_beta(name: str, beta: float) -> None:
    if not 0.0 <= beta <= 1.0:
        raise UserError(f"{name}={beta} must be between 0 and 1")


@dataclasses.dataclass(frozen=True)
class DGQAEma(_Dynamic):
    """DGQA by an exponential moving average of the scores.

    Attributes:
      beta: weight of the current scores.
    """

    beta: float = option(0.9, check=_check_beta)

    def apportion(self, scores: Array, cache: Array, num_heads: int) -> tuple[Array, Array]:
        return alloc.dgqa_ema_allocation(
            scores, cache, num_heads, self.beta, self.min_heads_per_group
        )


@dataclasses.dataclass(frozen=True)
class DGQADiff(_Dynamic):
    """DGQA by the difference to the scores of the last update."""

    def apportion(self, scores: Array, cache: Array, num_heads: int) -> tuple[Array, Array]:
        return alloc.dgqa_diff_allocation(scores, cache, num_heads, self.min_heads_per_group)
