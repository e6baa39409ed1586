"""The whole protocol in small: what it writes, that it repeats itself, that it survives a kill."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from kdgqa_jax import config, study
from kdgqa_jax.errors import UserError

FIELDS = {
    "entry", "variant", "rule", "seed", "stage", "top1", "top5", "loss", "num_params",
    "num_kv_params", "num_heads", "num_kv_heads", "steps", "seconds", "allocation",
    "idle_kv_heads", "config", "versions", "device",
}  # fmt: skip
OVERRIDES = [
    *(f"--config.{stage}.epochs=0.2" for stage in ("pretrain", "uptrain", "finetune")),
    *(f"--config.{stage}.model.name=mu/4" for stage in ("pretrain", "uptrain", "finetune")),
    *(f"--config.{stage}.checkpoint_every=2" for stage in ("pretrain", "uptrain", "finetune")),
]
VARIANTS = "gqa,kdgqa"


def tiny_study(**changes):
    settings = config.load_config("demo:dataset=digits")
    settings.variants = tuple(VARIANTS.split(","))
    settings = config.override(settings, OVERRIDES)
    settings.update_from_flattened_dict(changes)
    return settings


def figures(workdir):
    """results.json without times."""
    records = json.loads((workdir / "report" / "results.json").read_text())
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    study.run_study(tiny_study(), workdir)
    return workdir


@pytest.mark.slow
def test_records(workdir):
    records = json.loads((workdir / "report" / "results.json").read_text())
    stages = [(r["variant"], r["rule"], r["stage"]) for r in records]
    assert stages == [
        ("mha", "", "pretrained"),
        *(
            (variant, "mean", stage)
            for variant in ("gqa", "kdgqa")
            for stage in ("converted", "uptrained", "finetuned")
        ),
    ]
    for record in records:
        assert set(record) >= FIELDS
        allocation = np.array(record["allocation"])
        assert allocation.shape == (4, record["num_kv_heads"])
        assert (allocation.sum(axis=1) == record["num_heads"]).all()
        assert record["idle_kv_heads"] == (allocation == 0).sum()
        # 4 layers; key and value: 64 -> K heads of 8, with bias
        assert record["num_kv_params"] == 4 * 2 * 65 * 8 * record["num_kv_heads"]
        # 0.2 epochs of 1,437 images in batches of 64
        assert record["steps"] == (0 if record["stage"] == "converted" else 4)
        assert 0 <= record["top1"] <= record["top5"] <= 100
    base, gqa = records[0], records[1]
    assert base["num_params"] - gqa["num_params"] == base["num_kv_params"] - gqa["num_kv_params"]
    assert all(set(r["allocation"][0]) == {2} for r in records if r["variant"] == "gqa")
    assert any(
        len(set(map(tuple, r["allocation"]))) > 1 for r in records if r["variant"] == "kdgqa"
    )


@pytest.mark.slow
def test_report_files(workdir):
    table = (workdir / "report" / "results.md").read_text()
    assert "| kdgqa | 8 | 4 |" in table and "negative_quarter_turn" in table
    for name in ("accuracy.png", "allocation.png"):
        with Image.open(workdir / "report" / name) as image:
            assert image.width > 600 and image.height > 300
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.mark.slow
def test_another_seed_gives_other_figures(workdir, tmp_path):
    study.run_study(tiny_study(seed=7, variants=("gqa",)), tmp_path)
    same = [record for record in figures(workdir) if record["variant"] in ("mha", "gqa")]
    for mine, other in zip(same, figures(tmp_path), strict=True):
        assert (mine["variant"], mine["stage"]) == (other["variant"], other["stage"])
        assert mine["loss"] != other["loss"]


@pytest.mark.slow
def test_killed_demo_goes_on_and_ends_with_the_same_figures(workdir, tmp_path):
    """SIGKILL between two stages, SIGKILL inside one, then to the end: the real command line."""
    command = [
        str(pathlib.Path(sys.executable).parent / "kdgqa"),
        *("demo", "--workdir", str(tmp_path), "--variants", VARIANTS, *OVERRIDES),
    ]
    environment = {**os.environ, "PYTHONPATH": ""}
    for seen in ("seed42/gqa/converted/record.json", "seed42/kdgqa/uptrained/checkpoints/2"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        deadline = time.monotonic() + 240
        while not (tmp_path / seen).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "report" / "results.json").exists()
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "step 0/" not in ended.stdout and "variant" in ended.stdout
    assert figures(tmp_path) == figures(workdir)


@pytest.mark.slow
def test_rules_of_conversion_and_lengths_of_uptraining(tmp_path):
    settings = tiny_study(
        variants=("gqa@svd+refit",), calibration_images=16, uptrain_steps=("2",), num_kv_heads=2
    )
    settings.pretrain.epochs, settings.finetune.epochs = 0.1, 0.0
    records = study.run_study(settings, tmp_path)
    assert [(r["entry"], r["rule"], r["stage"], r["steps"]) for r in records[1:]] == [
        ("gqa (svd+refit)", "svd+refit", "converted", 0),
        ("gqa (svd+refit)", "svd+refit", "uptrained 2", 2),
    ]
    model = json.loads((tmp_path / "seed42/gqa@svd+refit/converted/model/model.json").read_text())
    notes = " ".join(model["converted"]["notes"])
    assert "calibrated with 16 images" in notes and "refitted with 16 images" in notes
    table = (tmp_path / "report" / "results.md").read_text()
    assert "| gqa (svd+refit) | 8 | 2 |" in table and "uptrained 2: 2 steps more" in table


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": ("gqa", "kdqga")}, "unknown attention variant 'kdqga': did you mean 'kdgqa'"),
        ({"variants": ("mha", "mhsa")}, "names one of them twice"),
        ({"pooling": "avg"}, "unknown pooling 'avg'"),
        ({"variants": ("gqa@svf",)}, "unknown pooling 'svf': did you mean 'svd'"),
        ({"variants": ("gqa@svd+fre",)}, "option of the rule 'svd.fre' 'fre': did you mean 'free'"),
        ({"variants": ("gqa@mean+free",)}, "mean never takes data"),
        ({"variants": ("mha@svd",)}, "mha keeps all heads; leave '@svd' out"),
        ({"variants": ("gqa", "gqa@mean")}, "names one of them twice"),
        ({"calibration_images": 0}, "calibration_images=0 must be at least 1"),
        ({"uptrain_steps": ("50", "many")}, "must be different numbers of steps"),
        ({"num_kv_heads": 3}, "does not divide the 8 query heads"),
        ({"seeds": 0}, "must not be empty"),
        ({"finetune.data.shift": "nope"}, "finetune: unknown shift 'nope': did you mean 'none'"),
        ({"finetune.optim.learning_rate": -1.0}, "finetune: optim.learning_rate=-1.0 must be"),
        ({"finetune.batch_size": 0}, "finetune: batch_size=0 must be a positive multiple"),
        ({"uptrain.eval_batch_size": 0}, "uptrain: eval_batch_size=0 must be a positive"),
        ({"uptrain.epochs": float("nan")}, "uptrain.epochs=nan must be a finite number"),
        ({"uptrain.epochs": -1.0}, "uptrain: config field epochs=-1.0 must be positive"),
        ({"finetune.epochs": 1e300}, "finetune: config field epochs=1e.300 makes .* steps"),
        ({"finetune.data.name": "mnist"}, "finetune: data set 'mnist' needs a data directory"),
        ({"finetune.data.name": "folder:none"}, "finetune: .*none"),
        ({"finetune.data.mean": (0.5, 0.5)}, "finetune: data.mean=.* has 2 numbers"),
        ({"finetune.data.resize": "fit"}, "finetune: unknown resize 'fit'"),
        ({"finetune.data.workers": -1}, "finetune: config field data.workers=-1 must be 0 or"),
        ({"finetune.mesh.model": 3}, "finetune: mesh.fsdp=1 times mesh.model=3 must divide"),
        ({"finetune.optim.freeze": ("necks",)}, "finetune: optim.freeze: 'necks' matches no"),
        ({"finetune.model.dtype": "float33"}, "finetune: model option dtype='float33' must be"),
        ({"finetune.model.name": "mu/2"}, "patch_size is 4 there, 2 in mu/2"),
        ({"finetune.model.pool": "avg"}, "pool is 'token' there, 'avg' here"),
        ({"uptrain.model.name": "mu/2"}, "pretrain.model and uptrain.model differ in name"),
        ({"uptrain.model.norm_epsilon": 0.1}, "uptrain.model differ in norm_epsilon"),
    ],
)
def test_bad_studies_are_refused_before_they_begin(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        study.run_study(tiny_study(**changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()
