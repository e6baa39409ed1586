"""Attention by cuDNN, as far as that can be seen without a GPU: what is refused, what is called."""

import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from kdgqa_jax import sharding
from kdgqa_jax.errors import UserError
from kdgqa_jax.kernels import cudnn, grouped_attention


def inputs(tokens, heads=6, kv_heads=3, width=16, dtype=jnp.bfloat16, batch=2):
    shapes = ((batch, tokens, h, width) for h in (heads, kv_heads, kv_heads))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def on_gpu(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(
        cudnn.backend, "get_backend", lambda: type("", (), {"platform_version": "cuda"})
    )


@pytest.fixture
def version(monkeypatch):
    """JAX asks the library for its version, which is not here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(function, *given):
    """The program for NVIDIA GPUs."""
    return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def grads(index, *qkv):
    def loss(*qkv):
        return cudnn.attention(*qkv, index).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(*qkv)


@pytest.mark.parametrize("tokens, called", [(128, 128), (197, 256)])
@pytest.mark.parametrize("kind", ["equal", "batch", "example"])
def test_it_lowers_for_gpus(version, tokens, called, kind):
    """Forward and backward pass are one call each, of K heads in equal groups and N otherwise."""
    shape = {"equal": (), "batch": (6,), "example": (2, 6)}[kind]
    if kind == "equal":
        text = lowered(lambda *qkv: grads(None, *qkv), *inputs(tokens))
    else:
        text = lowered(grads, jax.ShapeDtypeStruct(shape, jnp.int32), *inputs(tokens))
    calls = re.findall(r"custom_call @(__cudnn\$\w+)\(.*?: \((.*?)\) ->", text)
    assert [name for name, _ in calls] == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    heads = 3 if kind == "equal" else 6
    for _, operands in calls:
        expected = [f"tensor<2x{called}x{n}x16xbf16>" for n in (6, heads, heads)]
        assert operands.split(", ")[:3] == expected
        assert ("tensor<2xi32>, tensor<2xi32>" in operands) == (called != tokens)  # real lengths
    mask = re.findall(r"mask_type\W+22: \W+22([A-Z_]+)", text)
    assert set(mask) == {"NO_MASK" if called == tokens else "PADDING"}


def test_only_k_heads_are_kept_for_the_backward_pass(version):
    index = jax.ShapeDtypeStruct((6,), jnp.int32)
    vjp = jax.eval_shape(
        lambda index, *qkv: jax.vjp(lambda *x: cudnn.attention(*x, index), *qkv)[1],
        index,
        *inputs(197),
    )
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.ndim > 1)
    # query and output, which is filled up; key and value; a number per query
    assert [s for s in shapes if s[1] == 197] == 2 * [(2, 197, 3, 16)] + [(2, 197, 6, 16)]
    assert sum(np.prod(s) for s in shapes if s[1] != 197) == 2 * 256 * 6 * (16 + 1)


def test_it_is_split_over_a_mesh(version):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    attend = sharding.jit_for(mesh)(cudnn.attention)
    for index in (None, jnp.zeros(6, jnp.int32)):
        given = (*inputs(64), index) if index is not None else inputs(64)
        assert "shard_map" in str(attend.trace(*given).jaxpr)


def test_it_is_preferred_where_it_serves(monkeypatch, version):
    on_gpu(monkeypatch)

    def calls(dtype, **options):
        def attend(*qkv):
            return grouped_attention(*qkv, **options)

        return "cudnn" in lowered(attend, *inputs(64, dtype=dtype))

    assert calls(jnp.bfloat16) and calls(jnp.float16)
    assert not calls(jnp.float32)
    assert not calls(jnp.bfloat16, mask=np.ones((64, 64), bool))
    assert not calls(jnp.bfloat16, return_maps=True)
    assert not calls(jnp.bfloat16, expansion="gather")


@pytest.mark.parametrize(
    "gpu, change, message",
    [
        (False, {}, "it is for NVIDIA GPUs, and this program is for the platform 'cpu'"),
        (True, {"dtype": jnp.float32}, "it takes bfloat16 and float16, and not float32"),
        (True, {"width": 12}, "its head width must be a multiple of 8 up to 128, and not 12"),
        (True, {"width": 136}, "its head width must be a multiple of 8 up to 128, and not 136"),
        (True, {"mask": True}, "it takes no mask"),
        (True, {"values": 8}, "it takes values as wide as keys, and not 8 and 16"),
    ],
)
def test_what_it_cannot_serve_is_reported_in_one_sentence(monkeypatch, gpu, change, message):
    if gpu:
        on_gpu(monkeypatch)
    options = {"implementation": "cudnn"}
    if change.pop("mask", False):
        options["mask"] = np.ones((9, 9), bool)
    values = change.pop("values", None)
    given = [jnp.zeros(x.shape, x.dtype) for x in inputs(9, **change)]
    given[2] = given[2][..., :values]
    for run in (lambda f, *x: f(*x), jax.eval_shape):
        with pytest.raises(UserError, match=f"'cudnn' cannot serve here: {message}") as caught:
            run(lambda *qkv: grouped_attention(*qkv, **options), *given)
        assert "\n" not in str(caught.value)


def test_maps_are_made_by_the_reference():
    """Whoever looks at maps may do so where the kernel does not run."""
    given = [jnp.asarray(helpers.normal(i, *x.shape), x.dtype) for i, x in enumerate(inputs(9))]
    ours = grouped_attention(*given, implementation="cudnn", return_maps=True)
    np.testing.assert_array_equal(ours[1], grouped_attention(*given, return_maps=True)[1])
