"""examples/front.py: sizes side by side, models judged in other shapes, the gate's figures."""

import importlib.util
import pathlib
import sys

import helpers
import jax
import numpy as np
import pytest

from kdgqa_jax import convert, vit


@pytest.fixture(scope="module")
def front():
    place = pathlib.Path(__file__).parents[1] / "examples" / "front.py"
    spec = importlib.util.spec_from_file_location("front_example", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rows_of_one_size_stand_side_by_side(front):
    rows = front.conversions(6, 64)
    assert len({row.name for row in rows}) == len(rows)
    assert sum(not row.refit for row in rows) >= 50
    sizes = {
        row.name: (6 + row.kv_heads) * (row.head_width + row.v_head_width) / (4 * 6 * 64)
        for row in rows
        if row.in_table and row.rule in ("svd", "width")
    }
    assert sizes["svd, 3 KV heads of 64, calibrated"] == 0.75
    assert sizes["width, 6 KV heads of 48, calibrated"] == 0.75
    halves = [name for name, size in sizes.items() if 0.49 < size <= 0.5]
    assert len(halves) == 3  # narrow, and with three and two key/value heads


def test_models_are_judged_as_they_are(front):
    """Repeated heads and zeros compute what the smaller model computes."""
    before, after = (
        helpers.tiny_vit("mha"),
        helpers.tiny_vit("gqa", head_width=5, v_head_width=3),
    )
    images = helpers.images(3)
    params = jax.device_get(helpers.vit_variables(before)["params"])
    small = convert.group_heads(before, {"params": params}, after, "svd").params
    true = vit.apply_in_evaluation(after, {"params": small}, images)[0]
    wide = front.in_shapes_of(jax.device_get(small), params)
    helpers.assert_close(vit.apply_in_evaluation(before, {"params": wide}, images)[0], true, 1e-5)


def test_the_gate_ranks_what_is_printed(front):
    rng = np.random.default_rng(0)
    shares = rng.permutation(np.linspace(0.01, 0.9, 24))
    rows = [
        {
            "refit": False,
            "calibrated": bool(i % 2),
            "discarded": {"calibrated": share, "without data": share + (i % 2)},
            "cosine_of_few": 1 - share**2,
        }
        for i, share in enumerate(shares)
    ]
    found = front.gate(rows)
    assert found["calibrated"]["rank correlation"] == pytest.approx(-1.0)
    assert found["as printed"]["conversions"] == 24
    bands = found["without data"]["bands"]
    assert [count for _, count, _, _ in bands] == [6, 6]
    assert bands[0][2] > bands[1][3]  # the more is discarded, the less is kept
