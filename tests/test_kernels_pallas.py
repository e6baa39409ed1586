"""The TPU kernel, run operation by operation on a CPU, against the reference in XLA."""

import json
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import sharding
from kdgqa_jax.errors import UserError
from kdgqa_jax.kernels import SHORT, blocks, grouped_attention


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(blocks, "INTERPRET", True)


@pytest.fixture(autouse=True)
def strict():
    """No dtype and no rank is promoted."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def inputs(batch, tokens, sources, heads, kv_heads, width, dtype=np.float32):
    """Query, key, value and a cotangent."""
    queries, keys = (batch, tokens, heads, width), (batch, sources, kv_heads, width)
    shapes = (queries, keys, keys, queries)
    return [jnp.asarray(helpers.normal(i, *shape), dtype) for i, shape in enumerate(shapes)]


def index_of(kind, batch, heads, kv_heads):
    """A group index; the last key/value head is idle."""
    if kind == "equal":
        return None
    shape = (batch, heads) if kind == "example" else (heads,)
    index = np.random.default_rng(0).integers(0, max(kv_heads - 1, 1), shape, np.int32)
    return index if kind == "unsorted" else np.sort(index)


def value_and_vjp(query, key, value, cotangent, index, implementation, jit=helpers.fast_jit):
    """(output, gradients) by the compiled program."""

    def both(query, key, value, cotangent, index):
        def attend(*qkv):
            return grouped_attention(*qkv, index, implementation=implementation)

        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(cotangent)

    return jit(both)(query, key, value, cotangent, index)


@pytest.mark.parametrize(
    "sizes, kind",
    [
        ((2, 197, 197, 6, 3, 64), "example"),
        ((1, 197, 197, 6, 3, 64), "equal"),
        ((2, 9, 9, 12, 4, 8), "unsorted"),
        ((2, 10, 11, 12, 4, 32), "example"),
        ((2, 8, 9, 16, 1, 80), "equal"),
        ((1, 9, 8, 3, 3, 128), "unsorted"),
    ],
)
def test_output_and_gradients_are_those_of_the_reference(sizes, kind):
    given = inputs(*sizes)
    index = index_of(kind, sizes[0], *sizes[3:5])
    ours, expected = (value_and_vjp(*given, index, name) for name in ("pallas", "xla"))
    helpers.assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("tokens, sources", [(200, 300), (9, 200), (130, 10)])
@pytest.mark.parametrize("kind", ["example", "unsorted"])
def test_several_blocks(monkeypatch, tokens, sources, kind):
    """Of 128 tokens each; the last ones are partial, and what is beyond is NaN here."""
    monkeypatch.setattr(blocks, "BLOCK", 128)
    sizes = (2, tokens, sources, 6, 3, 8)
    given = inputs(*sizes)
    index = index_of(kind, *sizes[:1], *sizes[3:5])
    ours, expected = (value_and_vjp(*given, index, name) for name in ("pallas", "xla"))
    helpers.assert_close(ours, expected, 1e-5)
    assert not np.any(np.asarray(ours[1][1])[:, :, 2]), "the idle head has a gradient"


def test_half_precision():
    sizes = (2, 33, 33, 6, 3, 16)
    index = index_of("example", 2, 6, 3)
    ours = value_and_vjp(*inputs(*sizes, jnp.bfloat16), index, "pallas")
    exact = value_and_vjp(*inputs(*sizes, jnp.bfloat16), index, "xla")
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, exact)
    helpers.assert_close(jax.tree.map(jnp.float32, ours), jax.tree.map(jnp.float32, exact), 2e-2)


def test_one_compilation_serves_every_index():
    given = inputs(2, 9, 9, 6, 3, 8)
    attend = jax.jit(lambda index: grouped_attention(*given[:3], index, implementation="pallas"))
    for seed in range(3):
        index = np.random.default_rng(seed).integers(0, 3, (2, 6), np.int32)
        expected = grouped_attention(*given[:3], jnp.asarray(index), implementation="xla")
        helpers.assert_close(attend(index), expected, 1e-5)
    assert attend._cache_size() == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": np.ones((9, 9), bool)}, "it takes no mask"),
        ({"tokens": 7}, "it takes at least 8 tokens"),
        ({"memory": 100}, r"the heads of 128 tokens, \(6, 8\), take more than 100 bytes"),
        ({"width": 12}, "its head width must be a multiple of 8, and not 12"),
        ({"values": 16}, "it takes values as wide as keys, and not 16 and 8"),
        ({"dtype": np.float16}, "it takes float32 and bfloat16, and not float16"),
        ({"interpret": False}, "it is a kernel for TPUs, and this program is for .* 'cpu'"),
    ],
)
@pytest.mark.parametrize("run", [lambda f, *x: f(*x), jax.eval_shape], ids=["eager", "traced"])
def test_what_it_cannot_serve_is_reported_in_one_sentence(monkeypatch, change, message, run):
    monkeypatch.setattr(blocks, "INTERPRET", change.get("interpret", True))
    monkeypatch.setattr(blocks, "MEMORY", change.get("memory", blocks.MEMORY))
    given = inputs(
        1, change.get("tokens", 9), 9, 6, 3, change.get("width", 8), change.get("dtype", np.float32)
    )
    options = {"implementation": "pallas", "mask": change.get("mask")}
    with pytest.raises(UserError, match=message) as caught:
        value = jnp.tile(given[2], change.get("values", 8) // 8)
        run(lambda *qkv: grouped_attention(*qkv, **options), *given[:2], value)
    assert "\n" not in str(caught.value)


def test_tpus_prefer_it_where_it_serves(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(blocks, "memory", lambda: blocks.MEMORY)

    def calls(tokens, dtype=np.float32, **options):
        def attend(*qkv):
            return grouped_attention(*qkv, **options)

        return "pallas_call" in str(
            jax.make_jaxpr(attend)(*inputs(1, tokens, tokens, 6, 3, 8, dtype)[:3])
        )

    assert calls(SHORT) and calls(SHORT, jnp.bfloat16) and not calls(SHORT - 1)
    assert calls(SHORT - 1, implementation="pallas")
    assert not calls(SHORT, np.float16) and not calls(SHORT, return_maps=True)
    assert not calls(SHORT, mask=np.ones((SHORT, SHORT), bool))
    assert not calls(SHORT, expansion="block") and not calls(SHORT, implementation="xla")


# --- on several devices -------------------------------------------------------------------------


def differences() -> dict[str, float]:
    """How far a mesh is from one device, which runs the reference, by the kind of index."""
    mesh = sharding.make_mesh(model=2)
    sizes, found = (4, 9, 9, 6, 3, 8), {}
    for kind in ("equal", "unsorted", "example"):
        index = index_of(kind, 4, 6, 3)
        expected = value_and_vjp(*inputs(*sizes), index, "xla")
        given = [jax.device_put(x, sharding.batch_sharded(mesh)) for x in inputs(*sizes)]
        ours = value_and_vjp(*given, index, "pallas", sharding.jit_for(mesh))
        split = jax.NamedSharding(mesh, jax.P("data", None, "model"))
        assert ours[0].sharding.is_equivalent_to(split, 4), ours[0].sharding
        found[kind] = helpers.relative_difference(jax.device_get(ours), jax.device_get(expected))
    return found


def test_each_device_of_a_mesh_computes_its_images_and_heads():
    run = subprocess.run(
        [sys.executable, __file__],
        env=helpers.child_environment(4),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 3 and max(found.values()) < 1e-5, found


if __name__ == "__main__":
    blocks.INTERPRET = True
    print(json.dumps(differences()))
