"""A TPU kernel of our own for a group index that is not known at compile time.

No head is ever expanded in memory: a program has a block of query tokens and a block of key/value
tokens of one image, with all their heads, and looks up the key/value head of each query head among
those that it has.

Arrays are BNHT and BKHS, tokens along lanes: projections write them like that as easily. Scores are
keys x queries, so that maxima and sums of a softmax are rows of lanes, and of all that enters a
product only keys and values are ever transposed, once for all heads and queries. Where keys fill
more than one block the softmax is computed online, as in chunked.py, and the backward pass takes
two kernels: while one runs the gradients of keys and values stay, while the other runs those of
queries.
"""

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
from kdgqa_jax.kernels.mesh import on_each_device

Array = jax.Array
Ref = Any

INTERPRET = False
"""Run the kernels operation by operation on any platform: for tests."""

BLOCK = 1152
"""Most tokens of a block; the unrolled code of a program grows with them."""

MEMORY = 64 * 2**20
"""Bytes of a core's memory (VMEM) that a kernel may take at most, and where none is known."""


def refusal(
    query: Array, key: Array, value: Array, group_index: Array | None, mask: Array | None
) -> str | None:
    """See `Implementation`."""
    del group_index
    if sharding.platform() != "tpu" and not INTERPRET:
        return (
            f"it is a kernel for TPUs, and this program is for the platform {sharding.platform()!r}"
        )
    if mask is not None:
        return "it takes no mask"
    if query.shape[3] % 8:
        return f"its head width must be a multiple of 8, and not {query.shape[3]}"
    if not {query.dtype.name, value.dtype.name} <= {"float32", "bfloat16"}:
        return f"it takes float32 and bfloat16, and not {query.dtype.name}"
    if not all(isinstance(size, int) for size in (*query.shape, *key.shape)):
        return f"its shapes must be numbers, and not {query.shape} and {key.shape}"
    if min(query.shape[1], key.shape[1]) < 8:
        return "it takes at least 8 tokens"
    if not any(_fitting_blocks(query.shape, key.shape, query.dtype)):
        return f"the heads of 128 tokens, {query.shape[2:]}, take more than {_memory()} bytes"
    return None


def attention(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None = None,
    mask: None = None,
) -> Array:
    """As `grouped_attention` says, of arguments that `refusal` accepts."""
    del mask
    if group_index is None:
        group_index = jnp.arange(query.shape[2]) // (query.shape[2] // key.shape[2])
    group_index = jnp.clip(group_index.astype(jnp.int32), 0, key.shape[2] - 1)
    return on_each_device(_attend, query, key, value, group_index)


# --- calls ----------------------------------------------------------------------------------------


def _memory() -> int:
    """Bytes of VMEM that a kernel may take: half of what there is, XLA keeps arrays there, too."""
    if sharding.platform() != "tpu":
        return MEMORY
    return min(MEMORY, pltpu.get_tpu_info().vmem_capacity_bytes // 2)


def _fitting_blocks(
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
            if buffers + transposed + 8 * kv_heads * width * j <= _memory():
                yield rows, cols


@dataclasses.dataclass(frozen=True)
class _Sizes:
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
    def of(cls, query: Array, key: Array, group_index: Array) -> "_Sizes":
        """From query BNHT and key BKHS."""
        (batch, heads, width, length), (_, kv_heads, _, tokens) = query.shape, key.shape
        block = _fitting_blocks(
            (batch, length, heads, width), (batch, tokens, kv_heads, width), query.dtype
        )
        axes = batch, length, tokens, heads, kv_heads, width
        return cls(*axes, *next(block), group_index.ndim == 2)

    @property
    def blocks(self) -> tuple[int, int]:
        """Numbers of blocks: (of queries, of keys)."""
        return pl.cdiv(self.T, self.rows), pl.cdiv(self.S, self.cols)

    @property
    def block(self) -> "_Sizes":
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


def _call(
    kernel: Callable[..., None],
    sizes: _Sizes,
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
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_memory()
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * sizes.H,
            transcendentals=scores,
            bytes_accessed=sum(traffic(name, dtype) for name, dtype in dtypes.items()),
        ),
        interpret=INTERPRET,
        name=kernel.__name__.strip("_"),
    )(group_index.reshape(-1), inputs)


# --- inside of kernels ----------------------------------------------------------------------------


def _real(x: Array, block: Array, tokens: int) -> Array:
    """Of a block with tokens along its last axis what is there of `tokens`, zero beyond."""
    size = x.shape[-1]
    if tokens % size == 0:
        return x
    token = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(token < tokens - block * size, x, jnp.zeros_like(x))


def _transpose_heads(x: Ref, heads: Ref, block: Array, tokens: int) -> None:
    """(1, heads, H, tokens) -> (heads, tokens, H)."""
    for n in range(heads.shape[0]):
        heads[n] = _real(x[0, n], block, tokens).T


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """The product of a matrix and a matrix, which may be meant transposed: float32."""
    contracted = ((1,), (1 if transposed else 0,))
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _for_each_head(sizes: _Sizes, index: Ref, head: Callable[[Array, Array], None]) -> None:
    """Call `head` with every query head of this program's image and its key/value head."""
    start = pl.program_id(0) * sizes.N if sizes.per_example else 0

    def one(n: Array, _: None) -> None:
        head(n, index[start + n])

    jax.lax.fori_loop(0, sizes.N, one, None)


def _scores(sizes: _Sizes, key: Array, query: Array) -> Array:
    """(tokens, H) and (H, tokens) -> (keys, queries) float32, of which powers of two are maps."""
    return _dot(key, query) * (sizes.H**-0.5 * math.log2(math.e))


# --- forward --------------------------------------------------------------------------------------


def _forward_kernel(sizes, index, blocks, out, keep):
    i, j = pl.program_id(1), pl.program_id(2)
    several = sizes.blocks[1] > 1

    @pl.when((i == 0) | several)
    def start_keys():
        _transpose_heads(blocks["key"], keep["key"], j, sizes.S)

    if several:
        top, total, acc = (keep[name] for name in ("top", "total", "out"))

        @pl.when(j == 0)
        def start_queries():
            top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
            total[...] = jnp.zeros(total.shape, total.dtype)
            acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def head(n, kv):
        scores = _scores(sizes, keep["key"][kv], blocks["query"][0, n])
        if sizes.S % sizes.cols:
            key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            scores = jnp.where(key < sizes.S - j * sizes.cols, scores, -jnp.inf)
        largest = jnp.max(scores, axis=0, keepdims=True)
        if several:
            largest = jnp.maximum(largest, top[n])
        powers = jnp.exp2(scores - largest)
        sums = jnp.sum(powers, axis=0, keepdims=True)
        value = _real(blocks["value"][0, kv], j, sizes.S)
        mixed = _dot(value, powers.astype(value.dtype))
        if several:
            shrunk = jnp.exp2(top[n] - largest)
            top[n] = largest
            total[n] = total[n] * shrunk + sums
            acc[n] = acc[n] * shrunk + mixed
        else:
            write(n, largest, sums, mixed)

    def write(n, largest, sums, mixed):
        out["out"][0, n] = (mixed / sums).astype(out["out"].dtype)
        out["power"][0, n] = largest + jnp.log2(sums)

    _for_each_head(sizes, index, head)
    if several:

        @pl.when(j == sizes.blocks[1] - 1)
        def write_all():
            _for_each_head(sizes, index, lambda n, _: write(n, top[n], total[n], acc[n]))


def _forward(
    query: Array, key: Array, value: Array, group_index: Array
) -> tuple[Array, tuple[Array, ...]]:
    sizes = _Sizes.of(query, key, group_index)
    block = sizes.block
    scratch = {"key": ((block.K, block.S, block.H), key.dtype)}
    if sizes.blocks[1] > 1:
        row = (block.shape("row")[1:], jnp.float32)
        scratch |= {"top": row, "total": row, "out": (block.shape("query")[1:], jnp.float32)}
    results = _call(
        _forward_kernel,
        sizes,
        group_index,
        {"query": query, "key": key, "value": value},
        {"out": value.dtype, "power": jnp.float32},
        scratch,
        products=2,
        keys_innermost=True,
    )
    return results["out"], (query, key, value, group_index, results["out"], results["power"])


# --- backward -------------------------------------------------------------------------------------


def _maps(sizes, blocks, keep, n, kv, i):
    """(query, gradient of the output, maps, gradient of the scores) of a head.

    The first two are (H, queries), the last two (keys, queries), all in the dtype of the arrays.
    """
    query, out, grad, power = (
        _real(blocks[name][0, n], i, sizes.T) for name in ("query", "out", "out_grad", "power")
    )
    row = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=0, keepdims=True)
    maps = jnp.exp2(_scores(sizes, keep["key"][kv], query) - power)
    score_grad = maps * (_dot(keep["value"][kv], grad) - row)
    return query, grad, maps.astype(grad.dtype), score_grad.astype(query.dtype)


def _keys_kernel(sizes, index, blocks, out, keep):
    """Gradients of keys and values, and of queries where all keys are in one block."""
    j, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def start():
        for name in ("key", "value"):
            _transpose_heads(blocks[name], keep[name], j, sizes.S)
            keep[f"{name}_grad"][...] = jnp.zeros(keep[f"{name}_grad"].shape, jnp.float32)

    def head(n, kv):
        query, grad, maps, score_grad = _maps(sizes, blocks, keep, n, kv, i)
        keep["value_grad"][kv] += _dot(grad, maps, transposed=True)
        keep["key_grad"][kv] += _dot(query, score_grad, transposed=True)
        if "query_grad" in out:
            query_grad = _dot(blocks["key"][0, kv], score_grad) * sizes.H**-0.5
            out["query_grad"][0, n] = query_grad.astype(query.dtype)

    _for_each_head(sizes, index, head)

    @pl.when(i == sizes.blocks[0] - 1)
    def write():
        out["key_grad"][0] = (keep["key_grad"][...] * sizes.H**-0.5).astype(out["key_grad"].dtype)
        out["value_grad"][0] = keep["value_grad"][...].astype(out["value_grad"].dtype)


def _queries_kernel(sizes, index, blocks, out, keep):
    """Gradients of queries where there are several blocks of keys."""
    i, j = pl.program_id(1), pl.program_id(2)
    total = keep["query_grad"]

    @pl.when(j == 0)
    def start():
        total[...] = jnp.zeros(total.shape, total.dtype)

    for name in ("key", "value"):
        _transpose_heads(blocks[name], keep[name], j, sizes.S)

    def head(n, kv):
        score_grad = _maps(sizes, blocks, keep, n, kv, i)[3]
        total[n] += _dot(_real(blocks["key"][0, kv], j, sizes.S), score_grad)

    _for_each_head(sizes, index, head)

    @pl.when(j == sizes.blocks[1] - 1)
    def write():
        out["query_grad"][0] = (total[...] * sizes.H**-0.5).astype(out["query_grad"].dtype)


def _backward(kept: tuple[Array, ...], out_grad: Array) -> tuple[Array | None, ...]:
    query, key, value, group_index, out, power = kept
    sizes = _Sizes.of(query, key, group_index)
    block = sizes.block
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {"out": out, "out_grad": out_grad, "power": power}
    tokens_first, heads = (block.K, block.S, block.H), block.shape("key")[1:]
    transposed = {"key": (tokens_first, key.dtype), "value": (tokens_first, value.dtype)}
    of_keys = {"key_grad": (heads, jnp.float32), "value_grad": (heads, jnp.float32)}
    grads = {"key_grad": key.dtype, "value_grad": value.dtype}
    of_queries = {"query_grad": query.dtype}
    one_block = sizes.blocks[1] == 1
    results = _call(
        _keys_kernel,
        sizes,
        group_index,
        inputs,
        grads | of_queries if one_block else grads,
        transposed | of_keys,
        products=5 if one_block else 4,
        keys_innermost=False,
    )
    if not one_block:
        results |= _call(
            _queries_kernel,
            sizes,
            group_index,
            inputs,
            of_queries,
            transposed | {"query_grad": (block.shape("query")[1:], jnp.float32)},
            products=3,
            keys_innermost=True,
        )
    return *(results[f"{name}_grad"] for name in ("query", "key", "value")), None


@jax.custom_vjp
def _attend_blocks(query: Array, key: Array, value: Array, group_index: Array) -> Array:
    """Query BNHT, key and value BKHS, group index (N,) or (B, N) int32 in range -> BNHT."""
    return _forward(query, key, value, group_index)[0]


_attend_blocks.defvjp(_forward, _backward)


def _attend(query: Array, key: Array, value: Array, group_index: Array) -> Array:
    """The same with BTNH and BSKH."""
    arrays = (jnp.transpose(x, (0, 2, 3, 1)) for x in (query, key, value))
    return jnp.transpose(_attend_blocks(*arrays, group_index), (0, 3, 1, 2))
