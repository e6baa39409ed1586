"""What the devices of a mesh exchange in a training step: parameters and sums, never activations.

The number of devices is fixed when jax starts, so this file is also the script that the test runs
in a process of its own; it prints JSON, which the test reads.
"""

import functools
import json
import math
import re
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import pytest

from kdgqa_jax import initial, sharding, train_step, vit
from kdgqa_jax.config import train_config
from kdgqa_jax.data import pixels
from kdgqa_jax.data.randaugment import rand_augment

DEVICES, BATCH, CLASSES = 8, 40, 10
MESHES = {"fsdp": (4, 1), "model": (1, 4)}
OPERATIONS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def exchanged(attention: str, fsdp: int, model_axis: int, **options) -> dict[str, list[list[int]]]:
    """The shapes that every kind of collective of a compiled step has as its results."""
    config = train_config()
    size = {"name": "custom", "width": 32, "depth": 2, "num_heads": 4, "mlp_width": 64}
    config.model.update({**size, "attention": attention, **options})
    config.model.update({"num_kv_heads": 4 if attention == "mha" else 2, "image_size": 48})
    config.data.augment.rand_augment_ops = 0
    model = initial.build_model(config, CLASSES)
    mesh = sharding.make_mesh(fsdp, model_axis)
    step = train_step.make_train_step(model, train_step.step_config(config), 10, mesh)
    rng = jax.random.key(0)
    state = jax.eval_shape(
        lambda: train_step.init_state(vit.init_variables(model, rng), config, rng)
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        sharding.by_rules(state, mesh),
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharded(mesh))
        for name, shape, dtype in (
            ("image", (BATCH, 48, 48, 3), jnp.uint8),
            ("label", (BATCH,), jnp.int32),
        )
    }
    program = step.lower(state, batch).compile().as_text()
    found: dict[str, list[list[int]]] = {}
    for line in program.splitlines():
        match = re.search(rf" = (.*?) ({OPERATIONS})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.setdefault(match[2], []).extend(
                [int(n) for n in shape.split(",") if n] for shape in shapes
            )
    sizes = sorted({x.size for x in jax.tree.leaves(state.params)})
    return {"parameters": sizes, **found}


def exchanged_by_augmentation(form: pixels.Form) -> list[str]:
    """The collectives of RandAugment alone."""
    pixels.FORMS[jax.default_backend()] = form
    jax.clear_caches()
    mesh = sharding.make_mesh()
    split = sharding.batch_sharded(mesh)
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8, sharding=split)
    keys = jax.ShapeDtypeStruct((16,), jax.random.key(0).dtype, sharding=split)
    augment = sharding.jit_for(mesh, out_shardings=split)(rand_augment)
    program = augment.lower(images, keys).compile().as_text()
    return re.findall(rf" ({OPERATIONS})(?:-start)?\(", program)


@functools.lru_cache
def results() -> dict[str, dict[str, dict]]:
    environment = helpers.child_environment(DEVICES)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def activations(found: dict) -> list:
    """What is exchanged though it is no parameter, gradient or small sum."""
    tokens = (48 // 16) ** 2 + 1
    least = BATCH // DEVICES * tokens * 32  # one device's share of the residual stream
    split = MESHES["fsdp"][0]
    known = {size // n for size in found["parameters"] for n in (1, split)}  # whole, or a share
    return [
        (kind, shape)
        for kind, shapes in found.items()
        if kind != "parameters"
        for shape in shapes
        if kind in ("all-to-all", "collective-permute")
        or (math.prod(shape) >= least and math.prod(shape) not in known)
    ]


pytestmark = pytest.mark.slow  # seven compilations


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "kdgqa"])
def test_fsdp_gathers_parameters_only(attention):
    found = results()["fsdp"][attention]
    assert found["all-gather"]
    assert set(map(math.prod, found["all-gather"])) <= set(found["parameters"])
    assert not activations(found)


def test_the_check_sees_activations_that_are_not_held_to_the_batch():
    assert activations(results()["unconstrained"]["kdgqa"])


@pytest.mark.parametrize("form", ["indexed", "dense"])
def test_augmentation_exchanges_nothing(form):
    assert results()["augmentation"][form] == []


def test_tensor_parallelism_sums_branches_and_gathers_no_activation():
    """Beside the branches of a block, gradients of the keys and values that all devices have."""
    batch, tokens = BATCH // 2, (48 // 16) ** 2 + 1
    found = activations(results()["model"]["kdgqa"])
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert {tuple(shape) for _, shape in found} == {(batch, tokens, 32), (batch, tokens, 2, 8)}


if __name__ == "__main__":
    found = {
        mesh: {name: exchanged(name, *sizes) for name in ("mha", "kdgqa")}
        for mesh, sizes in MESHES.items()
    }
    forms = {"indexed": pixels.INDEXED, "dense": pixels.DENSE}
    found["augmentation"] = {name: exchanged_by_augmentation(form) for name, form in forms.items()}
    sharding.split_batch = lambda x: x
    train_step.make_train_step.cache_clear()
    scanned = {"scan_layers": True, "remat": "full"}
    found["unconstrained"] = {"kdgqa": exchanged("kdgqa", *MESHES["fsdp"], **scanned)}
    print(json.dumps(found))
