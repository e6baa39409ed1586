"""The same numbers as PyTorch: outputs of the authors' released code and of timm.

goldens/released_*.npz and timm_vit.npz hold `weights/<PyTorch name>`, the images, the logits and
the features that the released code (or timm) gave in float32 on CPU; allocations where it has any.
"""

import functools

import helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdgqa_jax import analysis, convert, vit
from kdgqa_jax.attention import configure

RELEASED = ("released_mhsa", "released_gqa", "released_kdgqa", "released_kdgqa_k6",
            "released_dgqa_ema")  # fmt: skip


@pytest.fixture(scope="module")
def released(golden, tmp_path_factory):
    """(golden, model, variables, images) of one run of the released code, or of timm."""

    @functools.cache
    def load(name, **options):
        values = golden(name)
        path = tmp_path_factory.mktemp("golden") / f"{name}.safetensors"
        save_file(helpers.golden_weights(values), path)
        converted = convert.load(path, num_heads=int(values["num_heads"]))
        model = vit.create(**converted.description["model"], **options)
        return values, model, converted.variables, values["images_nchw"].transpose(0, 2, 3, 1)

    return load


@functools.partial(jax.jit, static_argnums=0)
def logits_and_features(model, variables, images):
    return [model.apply(variables, images, method=name) for name in ("__call__", "features")]


capture = jax.jit(analysis.capture, static_argnums=0)


@pytest.mark.parametrize("expansion", ["gather", "one_hot"])
@pytest.mark.parametrize("name", RELEASED)
def test_logits_and_features_of_the_released_code(released, name, expansion):
    golden, model, variables, images = released(name, expansion=expansion)
    logits, features = logits_and_features(model, variables, images)
    helpers.assert_close(logits, golden["logits"], 1e-5)
    helpers.assert_close(features, golden["features"], 1e-5)


@pytest.mark.parametrize("name", ["released_kdgqa", "released_kdgqa_k6", "released_dgqa_ema"])
def test_allocations_of_the_released_code(released, name):
    golden, model, variables, images = released(name)
    seen = capture(model, variables, images)
    np.testing.assert_array_equal(seen.allocation, golden["allocation"])
    if "norms" in golden:  # the released code sums over the batch, the library takes the mean
        helpers.assert_close(seen.key_norm * len(images), golden["norms"], 1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_bfloat16_keeps_the_allocations(released, name):
    golden, model, variables, images = released(name, dtype="bfloat16")
    _, exact, _, _ = released(name)
    low, high = capture(model, variables, images), capture(exact, variables, images)
    np.testing.assert_array_equal(low.allocation, high.allocation)
    helpers.assert_close(low.logits, golden["logits"], 6e-2)


def test_timm_vit_and_its_mean_pooled_version(released):
    golden, mha, variables, images = released("timm_vit")
    logits, features = logits_and_features(mha, variables, images)
    helpers.assert_close(logits, golden["logits_mha"], 1e-5)
    helpers.assert_close(features, golden["features_mha"], 1e-5)
    pooled = convert.to_grouped(variables["params"], 3)
    gqa = mha.clone(attention=configure("gqa", 6, 3))
    logits = jax.jit(gqa.apply)({"params": pooled}, images)
    helpers.assert_close(logits, golden["logits_gqa_mean_pooled"], 1e-5)
