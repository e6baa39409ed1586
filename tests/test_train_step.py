"""One step: parts of a batch equal the whole, bad numbers change nothing, averages, meshes.

The number of devices is fixed when jax starts, so this file is also the script that a test runs in
a process of its own; it prints JSON, which the test reads.
"""

import json
import subprocess
import sys
import types

import helpers
import jax
import numpy as np
import pytest

from kdgqa_jax import aot, config, sharding, train_step, vit
from kdgqa_jax.errors import UserError


def settings_of(attention, **changes):
    """For a model of one layer on images of 8x8, with a small learning rate."""
    settings = config.train_config()
    settings.data.augment.rand_augment_ops = 0
    settings.model.attention = attention
    settings.model.window = 2
    settings.optim.learning_rate = 1e-4
    # With the eps of the recipe, rounding alone decides which way a gradient of zero moves.
    settings.optim.eps = 1e-4
    settings.update_from_flattened_dict(changes)
    return settings


def model_of(settings):
    sizes = {"width": 32, "depth": 1, "num_heads": 8, "mlp_width": 32, "image_size": 8}
    options = {**settings.model.to_dict(), **sizes, "name": "custom/4"}
    return vit.create(num_classes=5, **options)


def batch_of(seed, count=16):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 5, count).astype(np.int32)}


def begin(model, settings):
    """The state before the first step; heads differ, so that allocations do."""
    variables = helpers.vit_variables(model, channels=3)
    return train_step.init_state({"norm_stats": {}, **variables}, settings, jax.random.key(1))


def run(settings, steps=3, mesh=None, batches=None):
    """(state, metrics of every step) after some steps."""
    model = model_of(settings)
    mesh = mesh or sharding.make_mesh()
    state = begin(model, settings)
    state = jax.device_put(state, sharding.by_rules(state, mesh))
    step = train_step.make_train_step(model, train_step.step_config(settings), 100, mesh)
    seen = []
    for i in range(steps):
        batch = (batches or {}).get(i, batch_of(i))
        state, metrics = step(state, sharding.put_batch(batch, mesh))
        seen.append(jax.device_get(metrics))
    assert step._cache_size() == min(steps, 1)
    return jax.device_get(state), seen


def assert_away_from_ties(attention, seen):
    """Of the steps that allocate; in example scope only means over the batch are seen."""
    norms = [m["key_norm"] for m in seen]
    if attention == "kdgqa":
        helpers.assert_away_from_ties(attention, norms, 8)
    if attention in helpers.DGQA:
        scores, memory = [], 0.0
        for now in norms[::2]:  # the window
            ema = 0.9 * now + 0.1 * memory
            scores.append(np.abs(now - memory) if attention == "dgqa_diff" else ema)
            memory = now if attention == "dgqa_diff" else ema
        helpers.assert_away_from_ties(attention, scores, 8)


def differences(one, other):
    """How far two runs are from each other, relative to the size of what they are compared in."""
    (state, seen), (other_state, other_seen) = one, other
    return {
        "params": helpers.relative_difference(state.params, other_state.params),
        "norm_stats": helpers.relative_difference(state.norm_stats, other_state.norm_stats),
        **{
            name: helpers.relative_difference(
                [m[name] for m in seen], [m[name] for m in other_seen]
            )
            for name in ("loss", "allocation")
        },
    }


# --- accumulation -------------------------------------------------------------------------------

CASES = [
    ("mha", {}),
    ("kdgqa", {}),
    ("kdgqa", {"model.allocation_scope": "example"}),
    ("dgqa_diff", {}),
    ("pgqa", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "changes"), CASES)
def test_four_parts_of_a_batch_equal_the_whole(attention, changes):
    """Batch scope included: parts use the allocation of the whole batch."""
    batches = {i: batch_of(i, count=64) for i in range(3)}
    whole = run(settings_of(attention, **changes), batches=batches)
    parts = run(settings_of(attention, accumulate=4, **changes), batches=batches)
    found = differences(whole, parts)
    if not changes:
        assert_away_from_ties(attention, whole[1])
    assert all(value <= 1e-5 for value in found.values()), found
    for a, b in zip(whole[1], parts[1], strict=True):
        helpers.assert_close(a["key_norm"], b["key_norm"], 1e-5)
        assert a["top1"] == pytest.approx(b["top1"]) and a["top5"] == pytest.approx(b["top5"])
    if attention in ("kdgqa", "dgqa_diff") and not changes:  # or the test would show nothing
        assert np.ptp(whole[1][0]["allocation"]) > 0


@pytest.mark.slow
def test_a_microbatch_is_another_way_to_say_how_many_parts_there_are():
    programs = []
    for changes in ({"microbatch": 16}, {"accumulate": 4}, {}):
        settings = settings_of("kdgqa", batch_size=64, **changes)
        step, *arguments = aot.abstract_train_step(settings, 10, 1)
        programs.append(step.lower(*arguments).as_text())
    assert programs[0] == programs[1] != programs[2]


def test_allocations_change_once_per_update_and_in_the_window_only():
    _, seen = run(settings_of("dgqa_diff", accumulate=4), steps=4)
    allocations = [m["allocation"].tolist() for m in seen]
    assert allocations[0] == allocations[1] and allocations[2] == allocations[3]
    assert allocations[1] != allocations[2]


# --- what is not finite -------------------------------------------------------------------------


def poisoned(seed):
    batch = batch_of(seed)
    batch["image"][0] = 0
    return batch


def test_an_update_that_is_not_finite_is_skipped_and_counted(poison):
    settings = settings_of("dgqa_ema", on_nonfinite="skip", ema_decay=0.9)
    state, seen = run(settings, steps=4, batches={2: poisoned(2)})
    before, _ = run(settings, steps=2)
    at_once, _ = run(settings, steps=3, batches={2: poisoned(2)})
    assert int(at_once.step) == 3 and int(at_once.skipped) == 1
    for name in ("params", "norm_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(at_once, name), getattr(before, name))
    assert [int(m["skipped_updates"]) for m in seen] == [0, 0, 1, 1]
    assert int(state.first_skipped) == 3
    assert helpers.relative_difference(state.params, before.params) > 0  # it went on
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_after_an_update_that_stops_the_run_nothing_changes(poison):
    settings = settings_of("gqa")
    state, _ = run(settings, steps=4, batches={1: poisoned(1)})
    before, _ = run(settings, steps=1)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    assert int(state.first_skipped) == 2


# --- averages of weights ------------------------------------------------------------------------


def test_average_of_weights():
    states = [run(settings_of("gqa", ema_decay=0.15), steps=steps)[0] for steps in range(4)]
    average = states[0].params
    for step, state in enumerate(states[1:]):
        decay = min(0.15, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
    assert helpers.relative_difference(states[-1].ema, average) < 1e-6
    assert states[-1].variables["params"] is states[-1].ema


# --- meshes -------------------------------------------------------------------------------------

MESH = {"fsdp": 2, "model": 4}
NUM_KV_HEADS = {"gqa": (4,), "kdgqa": (2, 4), "dgqa_ema": (2,), "dgqa_diff": (4,), "pgqa": (2,)}
"""Four are split over the devices along the model axis; two are on all of them."""


def test_rules_split_what_can_be_split(monkeypatch):
    """Key/value heads that do not divide the devices are on all of them."""

    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "model": 4})
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: spec)
    shapes = {
        "blocks": {
            "attn": {
                "query": {"kernel": jax.ShapeDtypeStruct((2, 32, 4, 8), np.float32)},
                "key": {"kernel": jax.ShapeDtypeStruct((2, 32, 2, 8), np.float32)},
                "out": {"bias": jax.ShapeDtypeStruct((2, 32), np.float32)},
            },
            "mlp": {"fc2": {"kernel": jax.ShapeDtypeStruct((2, 64, 33), np.float32)}},
        },
        "step": jax.ShapeDtypeStruct((), np.int32),
    }
    specs = sharding.by_rules(shapes, mesh)
    attn, mlp = specs["blocks"]["attn"], specs["blocks"]["mlp"]
    assert tuple(attn["query"]["kernel"]) == (None, "fsdp", "model")
    assert tuple(attn["key"]["kernel"]) == (None, "fsdp")
    assert tuple(attn["out"]["bias"]) == ()
    assert tuple(mlp["fc2"]["kernel"]) == (None, "model")
    assert tuple(specs["step"]) == ()


@pytest.mark.parametrize(("fsdp", "model"), [(0, 1), (3, 1), (1, 2)])
def test_meshes_that_do_not_fit_are_refused(fsdp, model):
    with pytest.raises(UserError, match=f"mesh.fsdp={fsdp} times mesh.model={model} must divide"):
        sharding.make_mesh(fsdp, model)


def compare_meshes() -> dict[str, dict]:
    """For every variant: how far `MESH` is from one device."""
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    found = {}
    for attention in helpers.VARIANTS:
        for num_kv_heads in NUM_KV_HEADS.get(attention, (None,)):
            settings = settings_of(attention, **{"model.num_kv_heads": num_kv_heads})
            runs = [run(settings, mesh=mesh) for mesh in (one, sharding.make_mesh(**MESH))]
            assert_away_from_ties(attention, runs[0][1])
            found[f"{attention} {num_kv_heads or 8}"] = differences(*runs)
    return found


@pytest.mark.slow
def test_tensor_parallel_and_fsdp_equal_data_parallel():
    """Every variant, with as many key/value heads as devices along the model axis, or fewer."""
    done = subprocess.run(
        [sys.executable, __file__], env=helpers.child_environment(8), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.split()[0] for name in found} == set(helpers.VARIANTS)
    wrong = {k: v for k, v in found.items() if max(v.values()) > 1e-5 or v["allocation"]}
    assert not wrong


if __name__ == "__main__":
    print(json.dumps(compare_meshes()))
