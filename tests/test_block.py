"""Parts of the transformer block, in both precisions."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax.layers import gelu, layer_norm

HALVES = [jnp.bfloat16, jnp.float16]


def kept_dtypes(function, *arguments) -> set[str]:
    """The dtypes of the arrays that the forward pass keeps for the backward pass."""
    vjp = jax.eval_shape(lambda *x: jax.vjp(function, *x)[1], *arguments)
    return {leaf.dtype.name for leaf in jax.tree.leaves(vjp) if leaf.size > 1}


def test_gelu_is_exact_and_so_is_its_slope():
    x = np.linspace(-9.0, 9.0, 2001, dtype=np.float32)

    def exact(x):
        return jax.nn.gelu(x, approximate=False)

    for ours, theirs in ((gelu, exact), (jax.grad(gelu), jax.grad(exact))):
        helpers.assert_close(jax.vmap(ours)(x), jax.vmap(theirs)(x), 1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_gelu_keeps_nothing_wider_than_its_input(dtype):
    x = jnp.asarray(helpers.normal(0, 4, 8), dtype)
    assert kept_dtypes(gelu, x) == {jnp.dtype(dtype).name}
    assert gelu(x).dtype == dtype
    expected = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    helpers.assert_close(gelu(x).astype(jnp.float32), expected, 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", [None, jnp.float32, *HALVES])
def test_layer_norm_is_exact_for_its_precision(dtype):
    """Also with a mean thirty times the deviation, where one pass in float32 loses three digits."""
    x = np.asarray(jnp.asarray(helpers.normal(0, 16, 384) + 30.0, dtype), np.float64)
    norm = layer_norm(1e-6, dtype=dtype)
    given = jnp.asarray(x, dtype or jnp.float32)
    out = helpers.fast_jit(lambda x: norm.init_with_output(jax.random.key(0), x)[0])(given)
    assert out.dtype == given.dtype
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    tolerance = max(2 * float(jnp.finfo(given.dtype).eps), 1e-5)
    helpers.assert_close(np.asarray(out, np.float64), expected, tolerance)
