"""Capturing what a model does, in one call, for every variant and both layouts of the layers."""

import helpers
import jax
import numpy as np
import pytest

from kdgqa_jax import analysis, tree_utils


@pytest.mark.parametrize(
    ("attention", "scan_layers"),
    [*((attention, False) for attention in helpers.VARIANTS), ("kdgqa", True)],
)
def test_capture_explains_the_output(attention, scan_layers):
    model = helpers.tiny_vit(attention)
    variables, images = helpers.vit_variables(model, scale=0.15), helpers.images(3)
    params = variables["params"]
    if scan_layers:
        model = model.clone(scan_layers=True)
        variables = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)

    num_kv_heads = 6 if attention == "mha" else 3
    assert seen.maps.shape == (2, 3, 6, 5, 5)
    assert seen.key_norm.shape == seen.allocation.shape == (2, num_kv_heads)
    indices = [helpers.naive_index(allocation) for allocation in seen.allocation]
    np.testing.assert_array_equal(seen.group_index, indices)

    # Norms and maps from each layer's input, by hand.
    inputs = []
    logits = helpers.naive_vit(images, params, indices, 4, inputs=inputs)
    helpers.assert_close(seen.logits, logits, 1e-5)
    for i, x in enumerate(inputs):
        attn = params[f"blocks_{i}"]["attn"]
        helpers.assert_close(seen.key_norm[i], helpers.key_norms(x, attn).mean(0), 1e-5)
        helpers.assert_close(seen.image_norms[i], helpers.key_norms(x, attn), 1e-5)
        projected = [helpers.project(x, attn, name) for name in ("query", "key", "value")]
        helpers.assert_close(seen.values[i], projected[-1], 1e-5)
        outputs, maps, _ = helpers.naive_attention(*projected, indices[i])
        helpers.assert_close(seen.maps[i], maps, 1e-5)
        helpers.assert_close(seen.outputs[i], outputs, 1e-5)


def test_capture_in_example_scope_has_a_batch_axis():
    model = helpers.tiny_vit("kdgqa", allocation_scope="example")
    variables = helpers.vit_variables(model)
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, helpers.images(3))
    assert seen.allocation.shape == seen.key_norm.shape == (2, 3, 3)
    assert seen.group_index.shape == (2, 3, 6)
    assert (seen.allocation.sum(-1) == 6).all()
