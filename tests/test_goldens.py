"""The same numbers as PyTorch: outputs of the authors' released code and of timm.

goldens/released_*.npz and timm_vit.npz hold `weights/<PyTorch name>`, the images, the logits and
the features that the released code (or timm) gave in float32 on CPU; allocations where it has any.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import allocation, analysis, convert, vit

GOLDENS = pathlib.Path(__file__).parent / "goldens"
RELEASED = ("released_mhsa", "released_gqa", "released_kdgqa", "released_kdgqa_k6",
            "released_dgqa_ema")  # fmt: skip


def load(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def params_from_pytorch(golden, num_heads):
    """Parameters in our layout, from PyTorch's (out, in) matrices with heads in the rows."""
    weights = {k.removeprefix("weights/"): v for k, v in golden.items() if k.startswith("weights/")}

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    width = weights["cls_token"].shape[-1]
    head_width = width // num_heads

    def heads(weight, bias):
        kernel = weight.T.reshape(width, -1, head_width)
        return {"kernel": kernel, "bias": bias.reshape(-1, head_width)}

    params = {
        "cls_token": weights["cls_token"],
        "pos_embed": weights["pos_embed"],
        "patch_embed": {
            "kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": weights["patch_embed.proj.bias"],
        },
        "norm": norm("norm"),
        "head": dense("head"),
    }
    for i in range(2):
        block = f"blocks.{i}"
        if f"{block}.attn.qkv.weight" in weights:
            qkv = [np.split(weights[f"{block}.attn.qkv.{x}"], 3) for x in ("weight", "bias")]
        else:
            qkv = [[weights[f"{block}.attn.{p}.{x}"] for p in "qkv"] for x in ("weight", "bias")]
        query, key, value = (heads(w, b) for w, b in zip(*qkv, strict=True))
        out = dense(f"{block}.attn.proj")
        out["kernel"] = out["kernel"].reshape(num_heads, head_width, width)
        params[f"blocks_{i}"] = {
            "norm1": norm(f"{block}.norm1"),
            "norm2": norm(f"{block}.norm2"),
            "attn": {"query": query, "key": key, "value": value, "out": out},
            "mlp": {"fc1": dense(f"{block}.mlp.fc1"), "fc2": dense(f"{block}.mlp.fc2")},
        }
    return params


def model_of(golden, attention, **options):
    num_heads, num_kv_heads = int(golden["num_heads"]), int(golden["num_kv_heads"])
    return vit.create(
        "mu/8",
        width=48,
        depth=2,
        num_heads=num_heads,
        mlp_width=192,
        image_size=32,
        num_classes=7,
        attention=attention,
        num_kv_heads=None if attention in ("mha", "mhsa") else num_kv_heads,
        **options,
    )


def released(name, **options):
    """(golden, model, variables, images) of one run of the released code."""
    golden = load(name)
    model = model_of(golden, str(golden["scheme"]), **options)
    variables = {"params": params_from_pytorch(golden, int(golden["num_heads"]))}
    if "weights/blocks.0.attn.cache" in golden:
        variables["norm_stats"] = {
            f"blocks_{i}": {
                "attn": {
                    "key_norm": (cache := golden[f"weights/blocks.{i}.attn.cache"]),
                    "allocation": allocation.apportion(
                        jnp.asarray(cache), model.attention["num_heads"]
                    ),
                }
            }
            for i in range(2)
        }
    return golden, model, variables, golden["images_nchw"].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("implementation", ["gather", "one_hot"])
@pytest.mark.parametrize("name", RELEASED)
def test_logits_and_features_of_the_released_code(name, implementation):
    golden, model, variables, images = released(name, implementation=implementation)
    logits = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    features = jax.jit(lambda v, x: model.apply(v, x, method="features"))(variables, images)
    np.testing.assert_allclose(features, golden["features"], atol=1e-4)


@pytest.mark.parametrize("name", ["released_kdgqa", "released_kdgqa_k6", "released_dgqa_ema"])
def test_allocations_of_the_released_code(name):
    golden, model, variables, images = released(name)
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)
    np.testing.assert_array_equal(seen.allocation, golden["allocation"])
    if "norms" in golden:  # the released code sums over the batch, the library takes the mean
        np.testing.assert_allclose(seen.key_norm * len(images), golden["norms"], rtol=1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_bfloat16_keeps_the_allocations(name):
    golden, model, variables, images = released(name, dtype="bfloat16")
    _, exact, _, _ = released(name)
    capture = jax.jit(analysis.capture, static_argnums=0)
    low, high = capture(model, variables, images), capture(exact, variables, images)
    np.testing.assert_array_equal(low.allocation, high.allocation)
    np.testing.assert_allclose(low.logits, golden["logits"], atol=3e-2)


def test_timm_vit_and_its_mean_pooled_version():
    golden = load("timm_vit")
    images = golden["images_nchw"].transpose(0, 2, 3, 1)
    params = params_from_pytorch(golden, 6)
    mha = model_of(golden, "mha")
    np.testing.assert_allclose(
        jax.jit(mha.apply)({"params": params}, images), golden["logits_mha"], atol=1e-4
    )
    features = mha.apply({"params": params}, images, method="features")
    np.testing.assert_allclose(features, golden["features_mha"], atol=1e-4)
    pooled = convert.to_grouped(params, 3)
    logits = jax.jit(model_of(golden, "gqa").apply)({"params": pooled}, images)
    np.testing.assert_allclose(logits, golden["logits_gqa_mean_pooled"], atol=1e-4)
