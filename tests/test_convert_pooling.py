"""Pooling of key/value heads."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import convert, tree_utils, vit
from kdgqa_jax.errors import UserError


def naive_pool(x, num_kv_heads, rule):
    heads = np.moveaxis(np.asarray(x), -2, 0)
    group = len(heads) // num_kv_heads
    groups = [heads[i * group : (i + 1) * group] for i in range(num_kv_heads)]
    return np.moveaxis(np.stack([rule(g) for g in groups]), 0, -2)


@pytest.fixture(scope="module")
def mha():
    model = vit.create("mu/4", image_size=8, num_classes=5)
    return model, vit.init_variables(model, jax.random.key(0), 1)["params"]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("pooling", "rule"), [("mean", lambda g: g.mean(0)), ("first", lambda g: g[0])]
)
def test_pooling_equals_the_naive_loop(num_kv_heads, pooling, rule):
    kernel = jax.random.normal(jax.random.key(1), (16, 8, 4))
    bias = jax.random.normal(jax.random.key(2), (8, 4))
    for x in (kernel, bias):
        pooled = convert.pool_heads(x, num_kv_heads, pooling)
        helpers.assert_close(pooled, naive_pool(x, num_kv_heads, rule), 1e-6)


def test_random_pooling_takes_whole_heads_alike_for_kernel_and_bias():
    kernel = jnp.broadcast_to(jnp.arange(8.0)[:, None], (16, 8, 4))  # head k is full of k
    bias = jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, 4))
    chosen = set()
    for seed in range(20):
        rng = jax.random.key(seed)
        pooled = np.asarray(convert.pool_heads(kernel, 2, "random", rng))
        heads = pooled[0, :, 0]
        assert 0 <= heads[0] < 4 <= heads[1] < 8
        assert (pooled == heads[:, None]).all()
        pooled_bias = convert.pool_heads(bias, 2, "random", rng)
        np.testing.assert_array_equal(pooled_bias[:, 0], heads)
        chosen.add(tuple(heads))
    assert len(chosen) > 5


def test_only_key_and_value_change(mha):
    _, params = mha
    grouped = convert.to_grouped(params, 2)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grouped), strict=True
        )
        if a.shape != b.shape or not np.array_equal(a, b)
    ]
    assert set(changed) == {
        f"blocks_{i}/attn/{projection}/{leaf}"
        for i in range(4)
        for projection in ("key", "value")
        for leaf in ("kernel", "bias")
    }
    assert grouped["blocks_3"]["attn"]["value"]["kernel"].shape == (64, 2, 8)


def test_heads_that_are_alike_lose_nothing(mha):
    """Where the heads of each group are equal, the pooled model computes what the MHA one does."""
    model, params = mha
    alike = jax.tree.map(lambda x: x, params)
    for i in range(4):
        attention = alike[f"blocks_{i}"]["attn"]
        for projection in ("key", "value"):
            attention[projection] = jax.tree.map(
                lambda x: jnp.repeat(x[..., ::4, :], 4, axis=-2), attention[projection]
            )
    head = {"kernel": jax.random.normal(jax.random.key(3), (64, 5)), "bias": jnp.zeros(5)}
    alike["head"] = head  # the head starts at zero
    grouped_model = vit.create("mu/4", image_size=8, num_classes=5, attention="gqa", num_kv_heads=2)
    images = jax.random.normal(jax.random.key(4), (3, 8, 8, 1))
    before = jax.jit(model.apply)({"params": alike}, images)
    after = jax.jit(grouped_model.apply)({"params": convert.to_grouped(alike, 2)}, images)
    helpers.assert_close(after, before, 1e-5)
    assert np.ptp(before) > 0.1


@pytest.mark.parametrize("pooling", list(convert.POOLING))
def test_stacked_layers_convert_like_unstacked_ones(mha, pooling):
    _, params = mha
    unstacked = convert.to_grouped(params, 4, pooling, seed=5)
    stacked = convert.to_grouped(tree_utils.stack_layers(params), 4, pooling, seed=5)
    jax.tree.map(np.testing.assert_array_equal, tree_utils.unstack_layers(stacked), unstacked)


def test_as_many_heads_change_nothing(mha):
    _, params = mha
    jax.tree.map(np.testing.assert_array_equal, convert.to_grouped(params, 8), params)


def test_bad_requests_are_refused(mha):
    _, params = mha
    with pytest.raises(UserError, match="8 key/value heads cannot be pooled into 3"):
        convert.to_grouped(params, 3)
    with pytest.raises(UserError, match="unknown pooling 'meen': did you mean 'mean'"):
        convert.to_grouped(params, 4, "meen")
