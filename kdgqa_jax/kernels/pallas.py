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

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kdgqa_jax import sharding
from kdgqa_jax.kernels import blocks
from kdgqa_jax.kernels.blocks import Ref, Sizes, call, fitting_blocks, memory
from kdgqa_jax.kernels.mesh import on_each_device

Array = jax.Array


def refusal(
    query: Array, key: Array, value: Array, group_index: Array | None, mask: Array | None
) -> str | None:
    """See `Implementation`."""
    del group_index
    if sharding.platform() != "tpu" and not blocks.INTERPRET:
        return (
            f"it is a kernel for TPUs, and this program is for the platform {sharding.platform()!r}"
        )
    if mask is not None:
        return "it takes no mask"
    if value.shape[3] != key.shape[3]:
        return f"it takes values as wide as keys, and not {value.shape[3]} and {key.shape[3]}"
    if query.shape[3] % 8:
        return f"its head width must be a multiple of 8, and not {query.shape[3]}"
    if not {query.dtype.name, value.dtype.name} <= {"float32", "bfloat16"}:
        return f"it takes float32 and bfloat16, and not {query.dtype.name}"
    if not all(isinstance(size, int) for size in (*query.shape, *key.shape)):
        return f"its shapes must be numbers, and not {query.shape} and {key.shape}"
    if min(query.shape[1], key.shape[1]) < 8:
        return "it takes at least 8 tokens"
    if not any(fitting_blocks(query.shape, key.shape, query.dtype)):
        return f"the heads of 128 tokens, {query.shape[2:]}, take more than {memory()} bytes"
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


# --- inside of kernels ----------------------------------------------------------------------------
#
# A kernel gets the sizes, the group index, its blocks of what is given and of what goes out, and
# the memory that it keeps from one block to the next. Block i is of queries, block j of keys.


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


def _for_each_head(sizes: Sizes, index: Ref, head: Callable[[Array, Array], None]) -> None:
    """Call `head` with every query head of this program's image and its key/value head."""
    start = pl.program_id(0) * sizes.N if sizes.per_example else 0

    def one(n: Array, _: None) -> None:
        head(n, index[start + n])

    jax.lax.fori_loop(0, sizes.N, one, None)


def _scores(sizes: Sizes, key: Array, query: Array) -> Array:
    """(tokens, H) and (H, tokens) -> (keys, queries) float32, of which powers of two are maps."""
    return _dot(key, query) * (sizes.H**-0.5 * math.log2(math.e))


# --- forward --------------------------------------------------------------------------------------


def _forward_kernel(sizes, index, given, out, keep):
    i, j = pl.program_id(1), pl.program_id(2)
    several = sizes.blocks[1] > 1

    @pl.when((i == 0) | several)
    def start_keys():
        _transpose_heads(given["key"], keep["key"], j, sizes.S)

    if several:
        top, total, acc = (keep[name] for name in ("top", "total", "out"))

        @pl.when(j == 0)
        def start_queries():
            top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
            total[...] = jnp.zeros(total.shape, total.dtype)
            acc[...] = jnp.zeros(acc.shape, acc.dtype)

    def head(n, kv):
        scores = _scores(sizes, keep["key"][kv], given["query"][0, n])
        if sizes.S % sizes.cols:
            key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            scores = jnp.where(key < sizes.S - j * sizes.cols, scores, -jnp.inf)
        largest = jnp.max(scores, axis=0, keepdims=True)
        if several:
            largest = jnp.maximum(largest, top[n])
        powers = jnp.exp2(scores - largest)
        sums = jnp.sum(powers, axis=0, keepdims=True)
        value = _real(given["value"][0, kv], j, sizes.S)
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
    sizes = Sizes.of(query, key, group_index)
    block = sizes.block
    scratch = {"key": ((block.K, block.S, block.H), key.dtype)}
    if sizes.blocks[1] > 1:
        row = (block.shape("row")[1:], jnp.float32)
        scratch |= {"top": row, "total": row, "out": (block.shape("query")[1:], jnp.float32)}
    results = call(
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


def _maps(sizes, given, keep, n, kv, i):
    """(query, gradient of the output, maps, gradient of the scores) of a head.

    The first two are (H, queries), the last two (keys, queries), all in the dtype of the arrays.
    """
    query, out, grad, power = (
        _real(given[name][0, n], i, sizes.T) for name in ("query", "out", "out_grad", "power")
    )
    row = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=0, keepdims=True)
    maps = jnp.exp2(_scores(sizes, keep["key"][kv], query) - power)
    score_grad = maps * (_dot(keep["value"][kv], grad) - row)
    return query, grad, maps.astype(grad.dtype), score_grad.astype(query.dtype)


def _keys_kernel(sizes, index, given, out, keep):
    """Gradients of keys and values, and of queries where all keys are in one block."""
    j, i = pl.program_id(1), pl.program_id(2)

    @pl.when(i == 0)
    def start():
        for name in ("key", "value"):
            _transpose_heads(given[name], keep[name], j, sizes.S)
            keep[f"{name}_grad"][...] = jnp.zeros(keep[f"{name}_grad"].shape, jnp.float32)

    def head(n, kv):
        query, grad, maps, score_grad = _maps(sizes, given, keep, n, kv, i)
        keep["value_grad"][kv] += _dot(grad, maps, transposed=True)
        keep["key_grad"][kv] += _dot(query, score_grad, transposed=True)
        if "query_grad" in out:
            query_grad = _dot(given["key"][0, kv], score_grad) * sizes.H**-0.5
            out["query_grad"][0, n] = query_grad.astype(query.dtype)

    _for_each_head(sizes, index, head)

    @pl.when(i == sizes.blocks[0] - 1)
    def write():
        out["key_grad"][0] = (keep["key_grad"][...] * sizes.H**-0.5).astype(out["key_grad"].dtype)
        out["value_grad"][0] = keep["value_grad"][...].astype(out["value_grad"].dtype)


def _queries_kernel(sizes, index, given, out, keep):
    """Gradients of queries where there are several blocks of keys."""
    i, j = pl.program_id(1), pl.program_id(2)
    total = keep["query_grad"]

    @pl.when(j == 0)
    def start():
        total[...] = jnp.zeros(total.shape, total.dtype)

    for name in ("key", "value"):
        _transpose_heads(given[name], keep[name], j, sizes.S)

    def head(n, kv):
        score_grad = _maps(sizes, given, keep, n, kv, i)[3]
        total[n] += _dot(_real(given["key"][0, kv], j, sizes.S), score_grad)

    _for_each_head(sizes, index, head)

    @pl.when(j == sizes.blocks[1] - 1)
    def write():
        out["query_grad"][0] = (total[...] * sizes.H**-0.5).astype(out["query_grad"].dtype)


def _backward(kept: tuple[Array, ...], out_grad: Array) -> tuple[Array | None, ...]:
    query, key, value, group_index, out, power = kept
    sizes = Sizes.of(query, key, group_index)
    block = sizes.block
    inputs = {"query": query, "key": key, "value": value}
    inputs |= {"out": out, "out_grad": out_grad, "power": power}
    tokens_first, heads = (block.K, block.S, block.H), block.shape("key")[1:]
    transposed = {"key": (tokens_first, key.dtype), "value": (tokens_first, value.dtype)}
    of_keys = {"key_grad": (heads, jnp.float32), "value_grad": (heads, jnp.float32)}
    grads = {"key_grad": key.dtype, "value_grad": value.dtype}
    of_queries = {"query_grad": query.dtype}
    one_block = sizes.blocks[1] == 1
    results = call(
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
        results |= call(
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
