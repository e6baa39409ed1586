"""The grid of a study: its cells, their names and folders, and what they share."""

import numpy as np
import pytest

from kdgqa_jax import config, grid
from kdgqa_jax.errors import UserError

IMAGES = 1000


def small(**changes):
    settings = config.study_config()
    settings.variants = ("mha", "gqa", "dgqa_ema")
    settings.update_from_flattened_dict(changes)
    return settings


def folders(settings):
    return {
        (cell.seed, cell.name): [
            s.folder for s in grid.stages(cell.applied(settings), cell, IMAGES)
        ]
        for cell in grid.cells(settings)
    }


def test_without_axes_folders_are_those_of_variants():
    settings = small(variants=("mha", "gqa@svd"), seeds=2)
    found = folders(settings)
    assert list(found) == [(42, "mha"), (42, "gqa (svd)"), (43, "mha"), (43, "gqa (svd)")]
    assert found[43, "gqa (svd)"] == [
        "seed43/pretrained",
        *(f"seed43/gqa@svd/{stage}" for stage in ("converted", "uptrained", "finetuned")),
    ]


def test_an_axis_concerns_those_to_whom_it_makes_a_difference():
    settings = small(grid=("num_kv_heads=3|2", "model.window=100|300"))
    assert [cell.name for cell in grid.cells(settings)] == [
        "mha", "gqa, K=3", "gqa, K=2",
        *(f"dgqa_ema, K={k}, window={w}" for k in (3, 2) for w in (100, 300)),
    ]  # fmt: skip
    changed = grid.cells(settings)[-1].applied(settings)
    assert (changed.num_kv_heads, changed.uptrain.model.window) == (2, 300)
    assert changed.pretrain.model.window == 300 and changed.finetune.model.window == 300
    changed = grid.cells(settings)[3].applied(settings)
    assert (changed.uptrain.model.window, changed.finetune.model.window) == (100, 100)
    assert changed.pretrain.model.window == 300  # multi-head attention has none
    calibrated = small(variants=("gqa", "gqa@svd"), grid=("calibration_images=8|16",))
    assert len(grid.cells(calibrated)) == 3


def test_rules_are_an_axis_with_the_names_of_entries():
    cells = grid.cells(small(grid=("pooling=mean|svd",)))
    assert [(c.name, c.entry.folder) for c in cells] == [
        ("mha", "mha"), ("gqa (mean)", "gqa@mean"), ("gqa (svd)", "gqa@svd"),
        ("dgqa_ema (mean)", "dgqa_ema@mean"), ("dgqa_ema (svd)", "dgqa_ema@svd"),
    ]  # fmt: skip
    assert [c.name for c in grid.cells(small(variants=("gqa@first",), grid=("pooling=svd",)))] == [
        "gqa (first)"
    ]


@pytest.mark.parametrize(
    ("axis", "first_of_its_own"),
    [
        ("model.name=mu/4|mu/2", 0),
        ("pretrain.optim.learning_rate=0.1|0.2", 0),
        ("model.beta=0.5|0.9", 1),
        ("model.head_width=16|32", 1),
        ("model.image_size=28|56", 0),
        ("num_kv_heads=2|3", 1),
        ("uptrain.data.train_share=0.5|1.0", 1),
        ("uptrain.data.label_noise=0.0|0.4", 2),
        ("uptrain.epochs=1.0|2.0", 2),
        ("finetune.optim.learning_rate=0.1|0.2", 3),
    ],
)
def test_cells_share_the_stages_before_the_one_that_an_axis_changes(axis, first_of_its_own):
    settings = small(variants=("dgqa_ema",), grid=(axis,))
    one, other = (
        grid.stages(cell.applied(settings), cell, IMAGES) for cell in grid.cells(settings)
    )
    same = [a == b for a, b in zip(one, other, strict=True)]
    assert same == [i < first_of_its_own for i in range(4)]
    assert len({s.folder for s in (*one, *other)}) == 8 - first_of_its_own
    assert [s.before for s in one] == ["", *(s.folder for s in one[:-1])]


def test_a_given_model_is_shared_by_all_seeds():
    settings = small(variants=("gqa",), seeds=2)
    settings.pretrain.epochs = 0.0
    assert [found[0] for found in folders(settings).values()] == ["pretrained", "pretrained"]


def test_lengths_and_probes_are_stages():
    settings = small(variants=("gqa",), uptrain_steps=(5, 20), probes=("knn", "linear"))
    settings.probed, settings.finetune.epochs = ("converted", "uptrained"), 0.0
    stages = grid.stages(settings, grid.cells(settings)[0], IMAGES)
    assert [s.name for s in stages] == [
        "pretrained", "converted", "uptrained 5", "uptrained 20",
        "probes of converted", "probes of uptrained 5", "probes of uptrained 20",
    ]  # fmt: skip
    assert stages[-1].folder == "seed42/gqa/uptrained_20_knn+linear"
    assert stages[-1].before == stages[3].folder == "seed42/gqa/uptrained_20"
    assert stages[3].before == stages[1].folder
    np.testing.assert_allclose([s.epochs for s in stages[2:4]], [0.16, 0.64])


def test_names_of_folders_are_safe_and_unique():
    settings = small(variants=("gqa",), grid=("model.name=mu/4|mu%2F4",))
    one, other = (
        grid.stages(cell.applied(settings), cell, IMAGES)[1] for cell in grid.cells(settings)
    )
    assert one.folder == "seed42/gqa,model.name=mu%2F4/converted" != other.folder
    ambiguous = small(variants=("gqa",), grid=("uptrain.epochs=1.0", "finetune.epochs=2.0"))
    assert grid.cells(ambiguous)[0].name == "gqa, uptrain.epochs=1.0, finetune.epochs=2.0"
    with pytest.raises(UserError, match="too long for the name of a folder; use fewer axes"):
        folders(small(variants=("gqa",), grid=(f"data.data_dir={'x' * 250}",)))
