"""Data parallel over eight fake devices equals one device, for every variant.

The number of devices is fixed when jax starts, so this file is also the script that the tests run
in a process of its own; it prints JSON, which they read.
"""

import functools
import json
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

DEVICES, BATCH, REAL = 8, 16, 13  # two images each; in the padded batch the last three are not real
CASES = {name: {} for name in helpers.VARIANTS} | {
    "kdgqa per example": {"allocation_scope": "example"}
}
BATCHES = ("full", "padded")


def step(model, params, state, images, labels, mask):
    """Masked cross entropy and all that comes with it, in training."""

    def loss(params):
        logits, captured = model.apply(
            {"params": params, **state},
            images,
            train=True,
            step=0,
            mask=mask,
            mutable=["norm_stats", "grouping"],
            rngs=helpers.rngs(),
        )
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        return jnp.sum(jnp.where(mask, losses, 0.0)) / jnp.sum(mask), (logits, captured)

    grads, (logits, captured) = jax.grad(loss, has_aux=True)(params)
    return {"logits": logits, "grads": grads, **captured}


def compare(attention: str, options: dict) -> dict[str, dict]:
    """How far eight devices are from one, by batch and by what is compared."""
    model = helpers.tiny_vit(attention, window=1, depth=1, **options)
    variables = helpers.vit_variables(model, scale=0.2)
    params, state = variables.pop("params"), variables
    per_example = options.get("allocation_scope") == "example"
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
    run = helpers.fast_jit(functools.partial(step, model))
    results = {}
    for name in BATCHES:
        count = BATCH if name == "full" else REAL
        mask = np.arange(BATCH) < count
        outputs = []
        for variables_there, batch_there, filling in ((None, None, 100.0), (whole, split, -7.0)):
            images, labels = helpers.images(BATCH), np.arange(BATCH) % 5
            images[count:] = filling  # the padding differs, and must not matter
            outputs.append(
                run(
                    *jax.device_put((params, state), variables_there),
                    *jax.device_put((images, labels, mask), batch_there),
                )
            )
        one, eight = outputs
        if attention in ("kdgqa", *helpers.DGQA):  # a memory of zeros changes no ratio
            norms = np.asarray(one["grouping"]["blocks_0"]["attn"]["key_norm"])
            helpers.assert_away_from_ties(attention, norms[:count] if per_example else norms, 6)
        results[name] = {
            "devices": [len(x["logits"].sharding.device_set) for x in outputs],
            "differences": {
                "logits": helpers.relative_difference(
                    one["logits"][:count], eight["logits"][:count]
                ),
                "grads": helpers.relative_difference(one["grads"], eight["grads"]),
                "norm_stats": helpers.relative_difference(
                    one.get("norm_stats"), eight.get("norm_stats")
                ),
            },
            "largest gradient": max(float(np.abs(g).max()) for g in jax.tree.leaves(one["grads"])),
            "norm_stats": "norm_stats" in one,
            "allocations": [
                x["grouping"]["blocks_0"]["attn"]["allocation"][
                    : count if per_example else None
                ].tolist()
                for x in outputs
            ],
        }
    return results


@pytest.fixture(scope="module")
def results():
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", __file__]
    environment = helpers.child_environment(DEVICES)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_one(results, case, batch):
    result = results[case][batch]
    assert result["devices"] == [1, DEVICES]
    one, eight = result["allocations"]
    assert one == eight
    assert result["largest gradient"] > 1e-3
    assert max(result["differences"].values()) < 1e-5, result["differences"]
    attention = case.split()[0]
    assert result["norm_stats"] == (attention in helpers.DGQA)
    if attention in ("kdgqa", *helpers.DGQA):
        assert one != [2, 2, 2]
        assert np.ndim(one) == 1 + ("example" in case)


if __name__ == "__main__":
    print(json.dumps({name: compare(name.split()[0], options) for name, options in CASES.items()}))
