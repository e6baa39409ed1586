"""Grouped attention in plain XLA: the reference, which serves everything and makes maps.

G is the number of query heads per key/value head in the equal grouping (N/K); the other letters are
those of the package, where equations write H for the width of any head, values' too. Inside,
queries are BTKGH. With a group index key/value heads are expanded to
query heads: K stands for N then, and G for 1. Residuals of the backward pass hold K key/value
heads; the expansion is made again where the backward pass needs it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdgqa_jax import sharding
from kdgqa_jax.errors import unknown

Array = jax.Array


# --- key/value heads -> query heads -------------------------------------------------------------


def _gather(x: Array, group_index: Array) -> Array:
    if group_index.ndim == 1:
        return jnp.take(x, group_index, axis=2, mode="clip")
    return jnp.take_along_axis(x, group_index[:, None, :, None], axis=2, mode="clip")


def _one_hot(x: Array, group_index: Array) -> Array:
    mask = jax.nn.one_hot(group_index, x.shape[2], dtype=x.dtype)
    equation = "BSKH,NK->BSNH" if group_index.ndim == 1 else "BSKH,BNK->BSNH"
    return jnp.einsum(equation, x, mask, precision=jax.lax.Precision.HIGHEST)


def _block(x: Array, group_index: Array) -> Array:
    # The mask times an identity over H (here J): one product that fills a matrix unit and leaves
    # the layout of the heads as it is.
    mask = jax.nn.one_hot(group_index, x.shape[2], dtype=x.dtype)
    blocks = jnp.einsum("...NK,HJ->...KHNJ", mask, jnp.eye(x.shape[3], dtype=x.dtype))
    equation = "BSKH,KHNJ->BSNJ" if group_index.ndim == 1 else "BSKH,BKHNJ->BSNJ"
    return jnp.einsum(equation, x, blocks, precision=jax.lax.Precision.HIGHEST)


EXPANSIONS: dict[str, Callable[[Array, Array], Array]] = {
    "gather": _gather,  # by the group index
    "one_hot": _one_hot,  # a contraction with the assignment mask
    "block": _block,  # the same with a mask of whole heads
}
"""How key/value heads are expanded to query heads: (BSKH, group index) -> BSNH."""


def expand_heads(x: Array, group_index: Array, expansion: str | None = None) -> Array:
    """Key/value heads for every query head: BSKH and (N,) or (B, N) int -> BSNH.

    `expansion` is a name in `EXPANSIONS`, which all give the same numbers; None: that of the
    platform in `FORMS`.

    Raises ValueError for an unknown expansion.
    """
    expansion = _form(expansion).expansion
    if expansion not in EXPANSIONS:
        raise unknown("expansion", expansion, EXPANSIONS)
    return EXPANSIONS[expansion](x, group_index)


# --- what suits a platform ----------------------------------------------------------------------


class Form(NamedTuple):
    """How attention is computed; the numbers are the same but for rounding.

    Attributes:
      expansion: a name in `EXPANSIONS`.
      query: the order of the axes BTKGH of queries in the products.
      key: the order of the axes BSKH of keys and values.
      merges: the query heads of a group are further query tokens of one head: G is 1, T is G T.
      repeats: scores are computed for their maxima, and again for their exponentials, so that
        memory never holds them.
    """

    expansion: str
    query: str = "BTKGH"
    key: str = "BSKH"
    merges: bool = False
    repeats: bool = False

    @property
    def scores(self) -> str:
        """Query . key -> BKGTS."""
        return f"{self.query},{self.key}->BKGTS"

    @property
    def mix(self) -> str:
        """BKGTS . value -> the order of queries."""
        return f"BKGTS,{self.key}->{self.query}"

    @property
    def source(self) -> str:
        """BKGTS . query -> the order of keys."""
        return f"BKGTS,{self.query}->{self.key}"

    def rows(self, x: Array) -> Array:
        """A number per row of the maps, BKGT1 -> the order of queries, H = 1."""
        return jnp.einsum(f"BKGTH->{self.query}", x)


FORMS: dict[str, Form] = {
    # A gather is a copy there, and products want their contracted axes last, and few large parts.
    "cpu": Form("gather", "BKGTH", "BKSH", merges=True),
    # There is no fast gather; the matrix unit takes whole heads, layouts are the compiler's, and
    # a product costs less than writing and reading its float32 results.
    "tpu": Form("block", repeats=True),
    # The gradient of a gather would have no fixed order of summation.
    "gpu": Form("one_hot"),
}
"""By platform; the rest takes that of GPUs."""


def _form(expansion: str | None = None) -> Form:
    form = FORMS.get(sharding.platform(), FORMS["gpu"])
    return form._replace(expansion=expansion) if expansion else form


# --- attention without maps -----------------------------------------------------------------------


def _expanded(x: Array, group_index: Array | None, form: Form) -> Array:
    """Keys or values BSKH in the order of `form`; K = N with a group index."""
    if group_index is not None:
        x = expand_heads(x, group_index, form.expansion)
    return jnp.einsum(f"BSKH->{form.key}", x)


def _scores(query: Array, key: Array, mask: Array | None, form: Form) -> Array:
    """Scaled query . key, very negative where masked: BKGTS float32."""
    scores = jnp.einsum(form.scores, query, key, preferred_element_type=jnp.float32)
    scores *= query.shape[-1] ** -0.5
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None,
    mask: Array | None,
    form: Form,
) -> Array:
    """Attention without maps: query in the order of `form`, key and value BSKH -> as query.

    The derivative is written down because the automatic one keeps float32 maps and sums products
    over T x S. With e the exponentials of the scores, r = 1 / sum(e) and o = r (e v), the gradient
    of a score is e r (do . v - do . o): its row sum is over the head width alone. What is kept of
    order T x S is e, in the dtype of the values.
    """
    return _attend_forward(query, key, value, group_index, mask, form)[0]


def _attend_forward(query, key, value, group_index, mask, form):
    keys, values = (_expanded(x, group_index, form) for x in (key, value))
    scores = _scores(query, keys, mask, form)
    if form.repeats:  # behind barriers: the compiler would take both products for one
        inputs = jax.lax.optimization_barrier((query, keys))
        top = jnp.max(_scores(*inputs, mask, form), axis=-1, keepdims=True)
        top = jax.lax.optimization_barrier(top)
    else:
        top = jnp.max(scores, axis=-1, keepdims=True)
    exponentials = jnp.exp(scores - top)
    inverse = form.rows(1.0 / jnp.sum(exponentials, axis=-1, keepdims=True))
    exponentials = exponentials.astype(value.dtype)
    out = jnp.einsum(form.mix, exponentials, values, preferred_element_type=jnp.float32)
    out = (out * inverse).astype(value.dtype)
    return out, (query, key, value, group_index, mask, exponentials, inverse, out)


def _attend_backward(form, kept, out_grad):
    query, key, value, group_index, mask, exponentials, inverse, out = kept
    expand = functools.partial(_expanded, group_index=group_index, form=form)
    (keys, to_key), (values, to_value) = (jax.vjp(expand, x) for x in (key, value))
    out_grad = out_grad.astype(jnp.float32) * inverse
    row = jnp.sum(out_grad * out.astype(jnp.float32), axis=-1, keepdims=True)
    row = jnp.einsum(f"{form.query}->BKGTH", row)  # BKGT1
    out_grad = out_grad.astype(value.dtype)
    grad = jnp.einsum(form.scores, out_grad, values, preferred_element_type=jnp.float32)
    grad = (grad - row) * exponentials.astype(jnp.float32) * query.shape[-1] ** -0.5
    if mask is not None:  # a row without any token has exponentials that no score moves
        grad = jnp.where(mask, grad, 0.0)
    grad = grad.astype(query.dtype)
    query_grad = jnp.einsum(form.mix, grad, keys)
    (key_grad,) = to_key(jnp.einsum(form.source, grad, query))
    (value_grad,) = to_value(jnp.einsum(form.source, exponentials, out_grad))
    return query_grad, key_grad, value_grad, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- attention ----------------------------------------------------------------------------------


def attention(
    query: Array,
    key: Array,
    value: Array,
    group_index: Array | None = None,
    mask: Array | None = None,
    *,
    expansion: str | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    transform_maps: Callable[[Array], Array] | None = None,
    return_maps: bool = False,
) -> Array | tuple[Array, Array]:
    """As `grouped_attention` says, of arguments whose shapes fit.

    Maps are made only for `return_maps`, `transform_maps` and dropout; without them the backward
    pass keeps one array of their size, in the dtype of the inputs, and there is no forward-mode
    derivative (`jax.jvp`; forward over reverse works).

    Raises ValueError for an unknown expansion, and for dropout without a key.
    """
    batch, length, num_heads, width = query.shape
    form = _form(expansion)
    split, rows = _groups(query, key, group_index, form)
    query = jnp.einsum(f"BTKGH->{form.query}", query.reshape(batch, length, *split, width))
    if form.merges:
        query = query.reshape(batch, *rows, width)
    if mask is not None:
        mask = _by_group(mask, (num_heads, length), rows)

    maps = None
    if return_maps or transform_maps is not None or dropout_rate > 0.0:

        @functools.partial(jax.checkpoint, prevent_cse=False)  # keeps K heads
        def scores(query: Array, key: Array) -> Array:
            return _scores(query, _expanded(key, group_index, form), mask, form)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def mix(maps: Array, value: Array) -> Array:
            return jnp.einsum(form.mix, maps, _expanded(value, group_index, form))

        maps = jax.nn.softmax(scores(query, key), axis=-1)
        maps = maps.reshape(batch, num_heads, length, -1)  # BNTS
        if transform_maps is not None:
            maps = transform_maps(maps)
        maps = _dropped(maps, dropout_rate, dropout_rng).astype(value.dtype)
        out = mix(maps.reshape(batch, *rows, maps.shape[3]), value)
    else:
        out = _attend(query, key, value, group_index, mask, form)
    if form.merges:
        out = out.reshape(batch, *split, length, value.shape[-1])
    out = jnp.einsum(f"{form.query}->BTKGH", out).reshape(batch, length, num_heads, -1)
    return (out, maps) if return_maps else out


def _groups(
    query: Array, key: Array, group_index: Array | None, form: Form
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """((K, G) of the query heads, (K, G, T) of the products, where `form` may merge G and T)."""
    length, num_heads = query.shape[1:3]
    num_kv_heads = key.shape[2] if group_index is None else num_heads
    size = num_heads // num_kv_heads
    merged = (num_kv_heads, 1, size * length)
    return (num_kv_heads, size), merged if form.merges else (num_kv_heads, size, length)


def _by_group(mask: Array, shape: tuple[int, int], rows: tuple[int, int, int]) -> Array:
    """A mask that broadcasts to BNTS, `shape` being (N, T) -> one that broadcasts to BKGTS."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    batch, heads, length, keys = mask.shape
    merged = rows[2] != shape[1]
    if heads == 1 and (length == 1 or not merged):
        return mask[:, :, None]
    return jnp.broadcast_to(mask, (batch, *shape, keys)).reshape(batch, *rows, keys)


def _dropped(maps: Array, rate: float, rng: Array | None) -> Array:
    if rate == 0.0:
        return maps
    if rng is None:
        raise ValueError("dropout_rate > 0 needs a dropout_rng")
    kept = jax.random.bernoulli(rng, 1.0 - rate, maps.shape)
    return jnp.where(kept, maps / (1.0 - rate), 0.0)
