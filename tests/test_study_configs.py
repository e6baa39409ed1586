"""The configs of studies in small, on digits: a cell of each runs to its end."""

import jax
import pytest

from kdgqa_jax import checkpoint, config, study, vit
from kdgqa_jax.configs import sweep

pytestmark = pytest.mark.slow


def given_model(path, **arguments):
    """A model directory with random weights, of ten classes and grey images."""
    made = vit.create(**arguments)
    variables = jax.device_get(vit.init_variables(made, jax.random.key(0), 1))
    about = {"model": arguments, "channels": 1, "class_names": [], "preprocessing": {}}
    checkpoint.save_model(path, variables, about)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    arguments = {"name": "mu/4", "image_size": 8, "num_classes": 10, "scan_layers": True}
    return given_model(tmp_path_factory.mktemp("given") / "model", **arguments)


def last_cell(settings):
    """The study with one variant and the last value of every axis."""
    settings.variants, settings.seeds = settings.variants[-1:], 1
    axes = (axis.split("=") for axis in settings.grid)
    settings.grid = tuple(f"{field}={values.split('|')[-1]}" for field, values in axes)
    return settings


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_sweeps(tmp_path, model, name):
    settings = last_cell(config.load_config(f"sweep:of={name},dataset=digits"))
    settings.pretrain.init, settings.pretrain.epochs, settings.finetune.epochs = model, 0.0, 0.0
    settings.calibration_images = 16
    if name != "length":
        settings.uptrain.epochs = 0.04  # an update, or two
    settings.uptrain.data.test_share = 0.1
    records = study.run_study(settings, tmp_path)
    assert [r["stage"] for r in records] == ["pretrained", "converted", "uptrained"]
    assert records[-1]["settings"].keys() | {"pooling"} >= {
        axis.partition("=")[0] for axis in settings.grid
    }
    assert records[-1]["steps"] >= 1 and records[-1]["loss"] > 0


def test_fashion_mnist(tmp_path):
    settings = last_cell(config.load_config("fashion_mnist:dataset=digits"))
    for section in (settings.pretrain, settings.uptrain, settings.finetune):
        section.epochs = 0.04
    records = study.run_study(settings, tmp_path)
    stages = ["pretrained", "converted", "uptrained", "finetuned"]
    assert [(r["entry"], r["stage"]) for r in records[1:]] == [("pgqa, K=2", s) for s in stages[1:]]
    assert records[-1]["config"]["data"]["shift"] == "negative_quarter_turn"


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory):
    arguments = {"name": "mu/14", "num_heads": 6, "width": 12, "depth": 1, "num_classes": 0}
    return given_model(tmp_path_factory.mktemp("six") / "model", **arguments, image_size=28)


def test_probes_of_dinov2(tmp_path, six_heads):
    settings = last_cell(config.load_config(f"dinov2:data=digits,init={six_heads}"))
    settings.calibration_images = 16
    records = study.run_study(settings, tmp_path)
    entry = "kdgqa (svd+refit), K=2"
    probed = ["converted", "knn converted", "linear converted"]
    assert [(r["entry"], r["stage"]) for r in records[1:]] == [(entry, stage) for stage in probed]
    assert records[1]["config"]["model"]["image_size"] == 112
    assert [r["probe"]["training_images"] for r in records[2:]] == [144, 144]
    assert all(r["top1"] > 20 for r in records[2:])  # chance is 10 %
    assert ["untrained_head" in r for r in records] == [True, True, False, False]
    text = (tmp_path / "report" / "results.md").read_text()
    title = "# digits, model: top-1 on the test images, %\n"  # the name of what was given
    assert text.startswith(title) and "| knn converted |" in text and "| converted |" not in text


def test_fine_tuning_of_dinov2(tmp_path, six_heads):
    name = f"dinov2:part=finetune,data=digits,target=digits,init={six_heads}"
    settings = last_cell(config.load_config(name))
    settings.calibration_images = 16
    settings.uptrain.epochs = settings.finetune.epochs = 0.1
    records = study.run_study(settings, tmp_path)
    assert [(r["stage"], r["steps"]) for r in records] == [
        ("pretrained", 0), ("converted", 0), ("uptrained", 1), ("finetuned", 1)
    ]  # fmt: skip
    assert records[-1]["entry"] == "pgqa (svd+refit), K=2"
