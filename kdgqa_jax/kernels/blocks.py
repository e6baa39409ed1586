"""How the kernels of pallas.py are called: in blocks of tokens that fit into memory."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kdgqa_jax import sharding

Array = jax.Array
Ref = Any

INTERPRET = False
"""Run the kernels operation by operation on any platform: for tests."""

BLOCK = 1152
"""Most tokens of a block; the unrolled code of a program grows with them."""

MEMORY = 64 * 2**20
"""Bytes of a core's memory (VMEM) that a kernel may take at most, and where none is known."""


def memory() -> int:
    """Bytes of VMEM that a kernel may take: half of what there is, XLA keeps arrays there, too."""
    if sharding.platform() != "tpu":
        return MEMORY
    return min(MEMORY, pltpu.get_tpu_info().vmem_capacity_bytes // 2)


def fitting_blocks(
    query: tuple[int, ...], key: tuple[int, ...], dtype: Any
) -> Iterator[tuple[int, int]]:
    """Tokens of blocks (of queries BTNH, of keys BSKH) that fit into memory, the largest first.

    They are all, or multiples of 128. It is the backward pass that counts: four arrays of each kind
    in two buffers each, copies of keys and values with H along the 128 lanes, their gradients.
    """

    def sizes(tokens: int) -> Iterator[int]:
        for count in range(pl.cdiv(tokens, BLOCK), pl.cdiv(tokens, 128) + 1):
            yield tokens if count == 1 else pl.cdiv(tokens, 128 * count) * 128

    (heads, width), (kv_heads, _) = query[2:], key[2:]
    item, lanes = jnp.dtype(dtype).itemsize, pl.cdiv(width, 128) * 128
    for cols in sizes(key[1]):
        for rows in sizes(query[1]):
            i, j = (pl.cdiv(tokens, 128) * 128 for tokens in (rows, cols))
            transposed = 2 * kv_heads * cols * lanes * item
            buffers = 8 * item * width * (heads * i + kv_heads * j)
            if buffers + transposed + 8 * kv_heads * width * j <= memory():
                yield rows, cols


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Axes by the letters of the package, and the tokens of a block of queries and one of keys."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    rows: int
    cols: int
    per_example: bool

    @classmethod
    def of(cls, query: Array, key: Array, group_index: Array) -> "Sizes":
        """From query BNHT and key BKHS."""
        (batch, heads, width, length), (_, kv_heads, _, tokens) = query.shape, key.shape
        block = fitting_blocks(
            (batch, length, heads, width), (batch, tokens, kv_heads, width), query.dtype
        )
        axes = batch, length, tokens, heads, kv_heads, width
        return cls(*axes, *next(block), group_index.ndim == 2)

    @property
    def blocks(self) -> tuple[int, int]:
        """Numbers of blocks: (of queries, of keys)."""
        return pl.cdiv(self.T, self.rows), pl.cdiv(self.S, self.cols)

    @property
    def block(self) -> "Sizes":
        """What a program has."""
        return dataclasses.replace(self, B=1, T=self.rows, S=self.cols)

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of an array with queries, with keys, or with a number per query."""
        return {
            "query": (self.B, self.N, self.H, self.T),
            "key": (self.B, self.K, self.H, self.S),
            "row": (self.B, self.N, 1, self.T),
        }[kind]


_KINDS = {"query": "query", "out": "query", "power": "row", "key": "key", "value": "key"}
"""Of the arrays that enter and leave kernels; a gradient is of the kind of what it belongs to."""


def call(
    kernel: Callable[..., None],
    sizes: Sizes,
    group_index: Array,
    inputs: dict[str, Array],
    outputs: dict[str, Any],
    scratch: dict[str, tuple[tuple[int, ...], Any]],
    products: int,
    keys_innermost: bool,
) -> dict[str, Array]:
    """Run a kernel on every pair of a block of queries and a block of keys of every image.

    Args:
      kernel: of (sizes, group index, blocks of inputs, blocks of outputs, scratch memory).
      sizes: of all arrays.
      group_index: (N,) or (B, N) int32.
      inputs: by name, gradients with the suffix "_grad".
      outputs: their dtypes by name.
      scratch: shape and dtype by name.
      products: matrix products of the size of the scores.
      keys_innermost: the blocks of keys pass while a block of queries stays, or the reverse.
    """
    count = dict(zip(("query", "key"), sizes.blocks, strict=True))
    outer, inner = ("query", "key") if keys_innermost else ("key", "query")
    kinds = {name: _KINDS[name.removesuffix("_grad")] for name in (*inputs, *outputs)}

    def spec(name: str) -> pl.BlockSpec:
        def place(b: Array, outer: Array, inner: Array, _: Ref) -> tuple[Any, ...]:
            i, j = (outer, inner) if keys_innermost else (inner, outer)
            return (b, 0, 0, j if kinds[name] == "key" else i)

        return pl.BlockSpec(sizes.block.shape(kinds[name]), place)

    def traffic(name: str, dtype: Any) -> int:
        """Bytes; an input is read again unless its block was that of the step before."""
        passes = (kinds[name] == "key") == (inner == "key") and count[inner] > 1
        times = count[outer] if name in inputs and passes else 1
        return times * math.prod(sizes.shape(kinds[name])) * jnp.dtype(dtype).itemsize

    scores = sizes.B * sizes.N * sizes.T * sizes.S
    dtypes = {name: x.dtype for name, x in inputs.items()} | outputs
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        out_shape={
            name: jax.ShapeDtypeStruct(sizes.shape(kinds[name]), dtype)
            for name, dtype in outputs.items()
        },
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.B, count[outer], count[inner]),
            in_specs=[{name: spec(name) for name in inputs}],
            out_specs={name: spec(name) for name in outputs},
            scratch_shapes=[{name: pltpu.VMEM(*of) for name, of in scratch.items()}],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=memory()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * sizes.H,
            transcendentals=scores,
            bytes_accessed=sum(traffic(name, dtype) for name, dtype in dtypes.items()),
        ),
        interpret=INTERPRET,
        name=kernel.__name__.strip("_"),
    )(group_index.reshape(-1), inputs)
