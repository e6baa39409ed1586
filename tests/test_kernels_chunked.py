"""Attention over chunks of keys: memory grows like the tokens, numbers are the reference's."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax.kernels import LONG, chunked, grouped_attention

N, K, H = 4, 2, 8


@pytest.fixture(autouse=True)
def strict():
    """No dtype and no rank is promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def index_of(kind, batch):
    """A group index; with "idle" one key/value head is not used by anybody."""
    rng = np.random.default_rng(0)
    return {
        "equal": None,
        "batch": np.array([1, 0, 0, 1]),
        "example": rng.integers(0, K, (batch, N)),
        "idle": np.ones(N, int),
    }[kind]


def inputs(batch, tokens):
    shapes = [(batch, tokens, heads, H) for heads in (N, K, K, N)]
    return [jnp.asarray(helpers.normal(i, *shape)) for i, shape in enumerate(shapes)]


def value_and_vjp(name, index, mask, query, key, value, cotangent):
    def attend(*qkv):
        return grouped_attention(*qkv, index, mask=mask, implementation=name)

    out, vjp = jax.vjp(attend, query, key, value)
    return out, vjp(cotangent)


@pytest.mark.parametrize(
    "tokens, kind",
    [(1025, "equal"), (1025, "batch"), (1025, "example"), (197, "example"), (8, "idle")],
)
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_reference(tokens, kind, masked):
    batch = 1 if tokens > 1000 and kind != "example" else 2
    mask = np.random.default_rng(1).random((tokens, tokens)) < 0.7 if masked else None
    if masked:
        mask[1] = False  # a token that may attend to nothing attends to all
    index = index_of(kind, batch)
    compute = jax.jit(value_and_vjp, static_argnums=0)
    index = None if index is None else jnp.asarray(index, jnp.int32)
    ours, expected = (compute(name, index, mask, *inputs(batch, tokens)) for name in NAMES)
    helpers.assert_close(ours, expected, 1e-5)


NAMES = ("chunked", "xla")


def test_a_single_token():
    index = jnp.asarray(index_of("batch", 2), jnp.int32)
    ours = [value_and_vjp(name, index, None, *inputs(2, 1)) for name in NAMES]
    helpers.assert_close(ours[0], ours[1], 1e-5, scale=1.0)


def temporary_bytes(name, tokens):
    """Of a loop over two layers, forward and backward."""

    def loss(x):
        def layer(x, _):
            heads = x.reshape(1, tokens, N, H)
            kv_heads = heads[:, :, :K]
            out = grouped_attention(
                heads, kv_heads, kv_heads, jnp.array([0, 1, 1, 1]), implementation=name
            )
            return x + out.reshape(x.shape), None

        return jax.lax.scan(layer, x, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, tokens, N * H), jnp.float32)
    compiled = helpers.fast_jit(jax.grad(loss)).lower(x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_like_the_tokens(monkeypatch):
    """Chunks are filled up with padding, whose masks must not be kept for all layers and chunks."""
    monkeypatch.setattr(chunked, "CHUNK", 32)
    growth = {
        name: temporary_bytes(name, 4 * 253) / (4 * temporary_bytes(name, 253)) for name in NAMES
    }
    assert growth["chunked"] < 1.2 < 2 < growth["xla"], growth


def test_long_inputs_prefer_it():
    def loops(tokens, **options):
        shapes = [jax.ShapeDtypeStruct((1, tokens, h, H), jnp.float32) for h in (N, K, K)]
        attend = lambda *qkv: grouped_attention(*qkv, **options)  # noqa: E731
        return "scan" in str(jax.make_jaxpr(attend)(*shapes))

    assert loops(LONG) and not loops(LONG - 1)
    assert loops(8, implementation="chunked")
    assert not loops(LONG, implementation="xla") and not loops(LONG, expansion="gather")
    assert not loops(LONG, return_maps=True) and not loops(LONG, transform_maps=jnp.sin)
