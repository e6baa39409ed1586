"""Attention over one chunk of keys after the other, in plain XLA: memory linear in their number.

The softmax is computed online (Milakov and Gimelshein 2018; Rabe and Staats 2021): a loop over
chunks carries the largest score of each row so far, the sum of exponentials and the sum of values
under it. The backward pass computes the scores of each chunk again (Dao et al. 2022).

Inside, queries are BKRH: R counts the query tokens of all the heads that share a key/value head, G
T in the equal grouping. With a group index K stands for N, R for T, and the key/value heads of a
chunk are expanded within the loop: what is kept for the backward pass holds K heads. Equations
write H for the width of any head, values' too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kdgqa_jax.kernels.xla import expand_heads

Array = jax.Array

CHUNK = 512
"""Most keys of a chunk; chunks are equally large but for padding of the last."""


def attention(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """As `grouped_attention` says, of arguments whose shapes fit."""
    batch, length, num_heads, width = query.shape
    kv_heads = key.shape[2] if group_index is None else num_heads
    size = num_heads // kv_heads
    rows = query.reshape(batch, length, kv_heads, size, width)
    rows = jnp.einsum("BTKGH->BKGTH", rows).reshape(batch, kv_heads, size * length, width)
    if mask is not None:
        mask = _mask_rows(mask, num_heads, length, kv_heads)
    out = _attend(rows, key, value, group_index, mask)
    out = out.reshape(batch, kv_heads, size, length, value.shape[-1])
    return jnp.einsum("BKGTH->BTKGH", out).reshape(batch, length, num_heads, -1)


def _mask_rows(mask: Array, num_heads: int, length: int, kv_heads: int) -> Array:
    """A mask that broadcasts to BNTS -> one that broadcasts to BKRS."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    batch, heads, tokens, keys = mask.shape
    if heads == tokens == 1 or num_heads == kv_heads:
        return mask
    mask = jnp.broadcast_to(mask, (batch, num_heads, length, keys))
    return mask.reshape(batch, kv_heads, -1, keys)


# --- chunks ---------------------------------------------------------------------------------------


def _split(x: Array, axis: int) -> Array:
    """The axis of keys S -> (chunk, ...) with chunks of that axis, filled up with zeros."""
    count = -(-x.shape[axis] // CHUNK)
    size = -(-x.shape[axis] // count)
    filling = [(0, 0)] * x.ndim
    filling[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, filling)
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(chunks: Array, tokens: int) -> Array:
    """Chunks of gradients, (chunk, B, C, K, H) -> BSKH."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _loop_over(key: Array, value: Array, mask: Array | None) -> dict[str, Array]:
    """What a loop over chunks reads in each round."""
    keys = _split(key, 1)  # (chunk, B, C, K, H)
    chunks = {"key": keys, "value": _split(value, 1)}
    if mask is not None and mask.shape[3] > 1:
        chunks["mask"] = _split(mask, 3)
    count, size = keys.shape[0], keys.shape[2]
    if count * size > key.shape[1]:
        real = jnp.arange(count * size) < key.shape[1]
        chunks["real"] = real.reshape(count, 1, 1, 1, size)
    # Masks come with the rest. Of what is known before the layers of a scan run, JAX would compute
    # all that follows once, before them: masks of the size of the scores.
    return jax.lax.optimization_barrier(chunks)


def _expanded(x: Array, group_index: Array | None) -> Array:
    """The key/value heads of a chunk, BCKH -> BKCH; K = N with a group index."""
    if group_index is not None:
        x = expand_heads(x, group_index)
    return jnp.einsum("BCKH->BKCH", x)


def _scores(query: Array, keys: Array, mask: Array | None, chunk: dict[str, Array]) -> Array:
    """BKRC float32: very negative where masked, -inf where there is no key."""
    scores = jnp.einsum("BKRH,BKCH->BKRC", query, keys, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(chunk.get("mask", mask), scores, jnp.finfo(scores.dtype).min)
    return jnp.where(chunk["real"], scores, -jnp.inf) if "real" in chunk else scores


# --- the loops ------------------------------------------------------------------------------------


@jax.custom_vjp
def _attend(
    query: Array, key: Array, value: Array, group_index: Array | None, mask: Array | None
) -> Array:
    """Query BKRH, key BSKH and value BSKV -> BKRV in the dtype of value."""
    return _attend_forward(query, key, value, group_index, mask)[0]


def _attend_forward(query, key, value, group_index, mask):
    def add(carry: tuple[Array, ...], chunk: dict[str, Array]) -> tuple[tuple[Array, ...], None]:
        top, total, out = carry
        keys, values = (_expanded(chunk[name], group_index) for name in ("key", "value"))
        scores = _scores(query, keys, mask, chunk)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        exponentials = jnp.exp(scores - new_top)
        shrunk = jnp.exp(top - new_top)
        total = total * shrunk + jnp.sum(exponentials, axis=-1, keepdims=True)
        mixed = jnp.einsum(
            "BKRC,BKCH->BKRH",
            exponentials.astype(value.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (new_top, total, out * shrunk + mixed), None

    zeros = jnp.zeros((*query.shape[:3], value.shape[-1]), jnp.float32)
    start = _of_rows(query, -jnp.inf), _of_rows(query, 0.0), zeros
    (top, total, out), _ = jax.lax.scan(add, start, _loop_over(key, value, mask))
    inverse = 1.0 / total
    out = (out * inverse).astype(value.dtype)
    # Without their axis of one: TPUs would fill it up to a row of 128 lanes.
    return out, (query, key, value, group_index, mask, top[..., 0], inverse[..., 0], out)


def _of_rows(query: Array, number: float) -> Array:
    return jnp.full((*query.shape[:3], 1), number, jnp.float32)


def _attend_backward(kept: tuple[Any, ...], out_grad: Array) -> tuple[Array | None, ...]:
    """As in xla.py; the maps are the exponentials of scores minus `top`, times `inverse`."""
    # The two are kept apart: their logsumexp would lose the sum where all is masked.
    query, key, value, group_index, mask, top, inverse, out = kept
    top, inverse = top[..., None], inverse[..., None]
    out_grad = out_grad.astype(jnp.float32) * inverse
    row = jnp.sum(out_grad * out.astype(jnp.float32), axis=-1, keepdims=True)
    out_grad = out_grad.astype(value.dtype)
    expand = functools.partial(_expanded, group_index=group_index)

    def add(query_grad: Array, chunk: dict[str, Array]) -> tuple[Array, tuple[Array, Array]]:
        (keys, to_key), (values, to_value) = (jax.vjp(expand, chunk[x]) for x in ("key", "value"))
        exponentials = jnp.exp(_scores(query, keys, mask, chunk) - top)
        grad = jnp.einsum("BKRH,BKCH->BKRC", out_grad, values, preferred_element_type=jnp.float32)
        grad = (grad - row) * exponentials * query.shape[-1] ** -0.5
        if mask is not None:  # a row without any token has exponentials that no score moves
            grad = jnp.where(chunk.get("mask", mask), grad, 0.0)
        grad = grad.astype(query.dtype)
        query_grad += jnp.einsum("BKRC,BKCH->BKRH", grad, keys, preferred_element_type=jnp.float32)
        (key_grad,) = to_key(jnp.einsum("BKRC,BKRH->BKCH", grad, query))
        exponentials = exponentials.astype(value.dtype)
        (value_grad,) = to_value(jnp.einsum("BKRC,BKRH->BKCH", exponentials, out_grad))
        return query_grad, (key_grad, value_grad)

    start = jnp.zeros(query.shape, jnp.float32)
    query_grad, grads = jax.lax.scan(add, start, _loop_over(key, value, mask))
    key_grad, value_grad = (_join(grad, key.shape[1]) for grad in grads)
    return query_grad.astype(query.dtype), key_grad, value_grad, None, None


_attend.defvjp(_attend_forward, _attend_backward)
