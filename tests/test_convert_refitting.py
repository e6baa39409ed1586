"""Refitting of output projections: one layer by least squares, a whole model by a naive pass."""

import math

import helpers
import jax
import numpy as np
import pytest
from helpers import H, N

from kdgqa_jax import convert, tree_utils
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads import ridge

STRENGTH = 1e-2


def test_refit_is_ridge_regression_towards_the_present_weights():
    rng = np.random.default_rng(17)
    n, size, width = 200, N * H, 5
    a = rng.standard_normal((n, size)) * np.exp(rng.standard_normal(size)) + 1.0
    y = a @ rng.standard_normal((size, width)) + 3.0 + rng.standard_normal((n, width))
    kernel, bias = rng.standard_normal((N, H, width)), rng.standard_normal(width)
    moments = (a.T @ a / n, a.T @ y / n, a.mean(0), y.mean(0))
    strength = 0.3
    root = np.sqrt(n * strength * a.var(0).mean())
    rows = np.block([[a, np.ones((n, 1))], [root * np.eye(size), np.zeros((size, 1))]])
    target = np.concatenate([y, root * kernel.reshape(size, width)])
    expected = np.linalg.lstsq(rows, target)[0]
    new, new_bias = convert.refit_output(kernel, bias, *moments, strength)
    helpers.assert_close(new.reshape(size, width), expected[:-1], 1e-9)
    helpers.assert_close(new_bias, expected[-1], 1e-9)
    stiff, _ = convert.refit_output(kernel, bias, *moments, 1e9)
    helpers.assert_close(stiff, kernel, 1e-6)
    still = (np.zeros((size, size)), np.zeros((size, width)), np.zeros(size), y.mean(0))
    helpers.assert_close(convert.refit_output(kernel, bias, *still)[0], kernel, 1e-7)
    with pytest.raises(UserError, match="strength=0 of the ridge regression"):
        convert.refit_output(kernel, bias, *moments, strength=0)


def naive_blocks(x, block, index):
    """(stream after attention, heads before the output projection, output) of a block, float64."""
    y = helpers.naive_norm(x, block["norm1"])
    q, k, v = (helpers.project(y, block["attn"], name) for name in ("query", "key", "value"))
    heads = helpers.naive_attention(q, k, v, index)[0]
    out = {leaf: np.asarray(a, np.float64) for leaf, a in block["attn"]["out"].items()}
    stream = x + np.einsum("BTNH,NHD->BTD", heads, out["kernel"]) + out["bias"]
    y = helpers.naive_norm(stream, block["norm2"])
    fc1, fc2 = (
        {k: np.asarray(a, np.float64) for k, a in block["mlp"][n].items()} for n in ("fc1", "fc2")
    )
    y = y @ fc1["kernel"] + fc1["bias"]
    y = 0.5 * y * (1.0 + np.vectorize(math.erf)(y / math.sqrt(2.0)))
    return stream, heads, stream + y @ fc2["kernel"] + fc2["bias"]


def naive_refit(x, before, after, index):
    """Layer after layer, all tokens at once, by one least-squares problem each."""
    y, fitted = x, {}
    for i in range(2):
        name = f"blocks_{i}"
        stream, _, x = naive_blocks(x, before[name], np.arange(N))
        _, heads, _ = naive_blocks(y, after[name], index)
        a = heads.reshape(-1, N * H)
        kernel = np.asarray(after[name]["attn"]["out"]["kernel"], np.float64).reshape(N * H, -1)
        root = np.sqrt(len(a) * STRENGTH * a.var(0).mean())
        rows = np.block([[a, np.ones((len(a), 1))], [root * np.eye(N * H), np.zeros((N * H, 1))]])
        target = np.concatenate([(stream - y).reshape(len(a), -1), root * kernel])
        solved = np.linalg.lstsq(rows, target)[0]
        fitted[name] = {"kernel": solved[:-1].reshape(N, H, -1), "bias": solved[-1]}
        block = {**after[name], "attn": {**after[name]["attn"], "out": fitted[name]}}
        _, _, y = naive_blocks(y, block, index)
    return fitted


@pytest.fixture(scope="module")
def models():
    """(before, its params, after, its params by mean pooling, images)."""
    before, after = helpers.tiny_vit("mha"), helpers.tiny_vit("gqa")
    params = helpers.vit_variables(before)["params"]
    images = helpers.images(13, seed=5) + 0.5
    return before, params, after, convert.to_grouped(params, 3), images


def test_refit_of_a_model_equals_a_naive_pass(models):
    """13 images in batches of 5: two of padding."""
    before, params, after, pooled, images = models
    found, missed = convert.refit_outputs(
        before, {"params": params}, after, {"params": pooled}, images, batch_size=5,
        strength=STRENGTH,
    )  # fmt: skip
    x = np.asarray(before.apply({"params": params}, images, method="embed"), np.float64)
    expected = naive_refit(x, params, pooled, np.repeat(np.arange(3), 2))
    for name, out in expected.items():
        helpers.assert_close(found[name]["attn"]["out"], out, 1e-4)
        assert missed[name][1] < 0.7 * missed[name][0]
        for kept in ("query", "key", "value"):
            assert found[name]["attn"][kept] is pooled[name]["attn"][kept]


def test_the_ridge_is_the_best_on_images_held_out(models):
    """Of the first layer, by least squares on what every fifth image does not see."""
    before, params, after, pooled, images = models
    _, refits = convert.refit_outputs(
        before, {"params": params}, after, {"params": pooled}, images, batch_size=4
    )
    x = np.asarray(before.apply({"params": params}, images, method="embed"), np.float64)
    stream, _, _ = naive_blocks(x, params["blocks_0"], np.arange(N))
    _, heads, _ = naive_blocks(x, pooled["blocks_0"], np.repeat(np.arange(3), 2))
    held = np.arange(13) % 5 == 4
    a, y = heads.reshape(*x.shape[:2], N * H), stream - x
    seen, wanted = (z[~held].reshape(-1, z.shape[-1]) for z in (a, y))
    judge, target = (z[held].reshape(-1, z.shape[-1]) for z in (a, y))
    kernel = np.asarray(pooled["blocks_0"]["attn"]["out"]["kernel"], np.float64).reshape(N * H, -1)
    missed = {}
    for strength in ridge.STRENGTHS:
        root = np.sqrt(len(seen) * strength * seen.var(0).mean()) * np.eye(N * H)
        rows = np.concatenate([seen - seen.mean(0), root])
        solved = np.linalg.lstsq(rows, np.concatenate([wanted - wanted.mean(0), root @ kernel]))[0]
        error = target - wanted.mean(0) - (judge - seen.mean(0)) @ solved
        missed[strength] = np.sum(error**2) / np.sum((target - target.mean(0)) ** 2)
    found = refits["blocks_0"]
    assert found.held_out.keys() == missed.keys()
    for strength, share in missed.items():
        helpers.assert_close(found.held_out[strength], share, 1e-3)
    assert found.strength == min(missed, key=missed.get)
    assert max(missed.values()) > 1.05 * min(missed.values())


def test_few_images_hold_none_out(models):
    before, params, after, pooled, images = models
    few = (before, {"params": params}, after, {"params": pooled}, images[:4])
    found, refits = convert.refit_outputs(*few)
    same, _ = convert.refit_outputs(*few, strength=ridge.UNTRIED)
    jax.tree.map(np.testing.assert_array_equal, found, same)
    assert refits["blocks_0"].held_out == {}


def test_both_layouts_of_layers_give_the_same(models):
    before, params, after, pooled, images = models
    unrolled, _ = convert.refit_outputs(
        before, {"params": params}, after, {"params": pooled}, images
    )
    stacked, _ = convert.refit_outputs(
        before.clone(scan_layers=True),
        {"params": tree_utils.stack_layers(params)},
        after.clone(scan_layers=True),
        {"params": tree_utils.stack_layers(pooled)},
        images,
    )
    helpers.assert_close(tree_utils.unstack_layers(stacked), jax.device_get(unrolled), 1e-6)


def test_a_variant_with_memory_is_refitted_as_it_starts(models):
    before, params, _, _, images = models
    after = helpers.tiny_vit("dgqa_ema")
    grouped = convert.group_heads(before, {"params": params}, after, images=images, refit=True)
    assert "output projections refitted with 13 images" in grouped.notes[-1]
    assert "that misses least on every 5th image, held out; by layer" in grouped.notes[-2]
    assert grouped.how["out"] == "refitted"
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), grouped.params))


def test_refitting_needs_images(models):
    before, params, after, pooled, images = models
    with pytest.raises(UserError, match="--refit needs --calibration"):
        convert.group_heads(before, {"params": params}, after, refit=True)
    with pytest.raises(UserError, match="calibration images must be"):
        convert.refit_outputs(before, {"params": params}, after, {"params": pooled}, images[:0])
