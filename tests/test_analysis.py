"""Capturing what a model does, in one call, for every variant and both layouts of the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import analysis, layers, vit
from kdgqa_jax.attention import VARIANTS


@pytest.mark.parametrize(
    ("attention", "scan_layers"),
    [*((attention, False) for attention in VARIANTS), ("kdgqa", True)],
)
def test_capture_explains_the_output(attention, scan_layers):
    model = vit.create(
        "mu/4",
        depth=2,
        image_size=8,
        num_classes=3,
        attention=attention,
        scan_layers=scan_layers,
    )
    variables = vit.init_variables(model, jax.random.key(0), 1)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)

    num_kv_heads = 8 if attention == "mha" else 4
    assert seen.maps.shape == (2, 3, 8, 5, 5)
    np.testing.assert_allclose(seen.maps.sum(-1), 1.0, atol=1e-5)
    assert seen.key_norm.shape == seen.allocation.shape == (2, num_kv_heads)
    for allocation, group_index in zip(seen.allocation, seen.group_index, strict=True):
        np.testing.assert_array_equal(
            group_index, np.repeat(np.arange(num_kv_heads), np.asarray(allocation))
        )
    np.testing.assert_allclose(seen.logits, model.apply(variables, images), atol=1e-6)

    # The first layer's norms and maps from its parameters, by hand.
    params = layers.unstack_layers(variables["params"])
    block = params["blocks_0"]
    tokens = model.apply(variables, images, method=lambda m, x: m.patch_embed(x))
    tokens = tokens.reshape(3, 4, 64)
    token = jnp.broadcast_to(params["cls_token"], (3, 1, 64))
    x = jnp.concatenate([token, tokens], axis=1) + params["pos_embed"]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    project = {
        name: jnp.einsum("BTD,DNH->BTNH", x, block["attn"][name]["kernel"])
        for name in ("query", "key")
    }
    norms = jnp.sqrt(jnp.square(project["key"]).sum((1, 3))).mean(0)
    np.testing.assert_allclose(seen.key_norm[0], norms, rtol=1e-4)
    key = project["key"][:, :, seen.group_index[0]]
    scores = jnp.einsum("BTNH,BSNH->BNTS", project["query"], key) / 8**0.5
    np.testing.assert_allclose(seen.maps[0], jax.nn.softmax(scores), atol=1e-5)


def test_capture_in_example_scope_has_a_batch_axis():
    model = vit.create("mu/4", depth=2, image_size=8, attention="kdgqa", allocation_scope="example")
    variables = vit.init_variables(model, jax.random.key(0), 1)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)
    assert seen.allocation.shape == seen.key_norm.shape == (2, 3, 4)
    assert seen.group_index.shape == (2, 3, 8)
    assert (seen.allocation.sum(-1) == 8).all()
