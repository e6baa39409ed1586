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
from source_helpers import folder_tree

from kdgqa_jax import config, study
from kdgqa_jax.errors import UserError

FIELDS = {
    "entry", "variant", "rule", "seed", "stage", "top1", "top5", "loss", "num_params",
    "num_kv_params", "num_heads", "num_kv_heads", "steps", "allocation", "idle_kv_heads",
    "config", "versions", "device", "settings", "folder",
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


def results(workdir):
    return (workdir / "report" / "results.json").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(directory of a study, seconds that it took)."""
    workdir, started = tmp_path_factory.mktemp("study"), time.monotonic()
    study.run_study(tiny_study(), workdir)
    return workdir, time.monotonic() - started


@pytest.fixture
def workdir(finished):
    return finished[0]


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
def test_killed_at_random_and_restarted_it_ends_with_the_same_results(finished, tmp_path):
    """SIGKILL at some moment with one job, and with two, then to the end: the real command line."""
    reference, seconds = finished
    command = [
        str(pathlib.Path(sys.executable).parent / "kdgqa"),
        *("demo", "--workdir", str(tmp_path), "--variants", VARIANTS, *OVERRIDES),
    ]
    environment = {**os.environ, "PYTHONPATH": ""}
    moments = np.random.default_rng(0)
    for jobs in ("1", "2"):
        process = subprocess.Popen(
            [*command, "--jobs", jobs], stdout=subprocess.DEVNULL, env=environment
        )
        while not (tmp_path / "config.json").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(moments.uniform(0.1, 0.5) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = [*command, "--jobs", "2"]
    ended = subprocess.run(again, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert results(tmp_path) == results(reference)
    timings = json.loads((tmp_path / "report" / "timings.json").read_text())
    assert len(timings) == 7 and all(value > 0 for value in timings.values())


@pytest.mark.slow
def test_a_given_model_probes_and_a_cell_that_fails(workdir, tmp_path):
    """A learning rate that overflows is found out in the run; all that does not need it is done."""
    given = workdir / "seed42" / "pretrained"
    settings = tiny_study(variants=("gqa",), seeds=2, probes=("knn", "linear"))
    settings.grid = ("uptrain.optim.learning_rate=1e30|1e-3",)
    settings.pretrain.epochs, settings.finetune.epochs = 0.0, 0.0
    settings.pretrain.init = str(given / "model")
    settings.uptrain.data.train_share = 0.5
    settings.uptrain.optim.warmup_steps = 0
    with pytest.raises(UserError, match=r"2 of 4 cells failed.*1e30.*not finite.*failed\.md"):
        study.run_study(settings, tmp_path)
    records = json.loads(results(tmp_path))
    base = [r for r in records if r["stage"] == "pretrained"]
    assert [(r["seed"], r["folder"]) for r in base] == [(42, "pretrained"), (43, "pretrained")]
    assert base[0]["top1"] == json.loads((given / "record.json").read_text())["top1"]

    failed = [r for r in records if "failed" in r]
    bad = "gqa, learning_rate=1e30"
    assert [(r["entry"], r["seed"], r["stage"]) for r in failed] == [
        (bad, 42, "uptrained"), (bad, 43, "uptrained")
    ]  # fmt: skip
    assert "not finite" in failed[0]["failed"]
    assert f"- {bad}, seed 42, uptrained: " in (tmp_path / "report" / "failed.md").read_text()
    assert "learning_rate=1e-3" in (tmp_path / "report" / "results.md").read_text()

    done = [r for r in records if r["seed"] == 42 and r["entry"] == "gqa, learning_rate=1e-3"]
    probed = ["knn converted", "linear converted"]
    assert [r["stage"] for r in done] == ["converted", "uptrained", *probed]
    assert done[1]["steps"] == 2  # of half the images
    assert all(r["probe"]["training_images"] == 718 and r["top1"] > 60 for r in done[2:])
    both = [r for r in records if r["stage"] == "converted" and r["seed"] == 42]
    assert {r["folder"] for r in both} == {"seed42/gqa/converted"} and len(both) == 2
    by_seed = {r["seed"]: r["top1"] for r in records if r["stage"] == "knn converted"}
    assert by_seed[42] != by_seed[43]  # other halves of the training images


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
        ({"grid": ("num_kv_heads",)}, "'num_kv_heads' must have the form FIELD=VALUE.VALUE"),
        ({"grid": ("num_kv_heads=2|2",)}, "no value twice"),
        ({"grid": ("num_kv_heads=2", "num_kv_heads=4")}, "has the axis num_kv_heads twice"),
        ({"grid": ("num_kv_heads=2|3",)}, "uptrain .num_kv_heads=3.: .*does not divide the 8"),
        ({"grid": ("num_kv_heds=2",)}, "unknown config field 'pretrain.num_kv_heds'"),
        ({"grid": ("model.windw=2",)}, "unknown config field 'pretrain.model.windw'"),
        ({"grid": ("pooling=mean|svf",)}, "unknown pooling 'svf': did you mean 'svd'"),
        ({"grid": ("model.window=0",), "variants": ("dgqa_ema",)}, "window=0 must be"),
        ({"probes": ("nkn",)}, "unknown probe 'nkn': did you mean 'knn'"),
        ({"probed": ("tuned",)}, "unknown stage in probed 'tuned': did you mean"),
        ({"pretrain.epochs": 0.0}, "epochs=0 takes a model as it is; say which one"),
        ({"uptrain.init": "model"}, "a study begins with the model in pretrain.init"),
        ({"uptrain.data.train_share": 0.0}, "uptrain: data.train_share=0.0 must be above 0"),
        ({"finetune.data.label_noise": 1.0}, "finetune: data.label_noise=1.0 must be at least 0"),
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


def test_a_target_with_other_colours_is_refused_where_no_model_can_be_fitted(tmp_path):
    """From grey images to RGB; the other way a patch embedding is summed."""
    folder_tree(tmp_path / "tree")
    changes = {"finetune.data.name": f"folder:{tmp_path / 'tree'}"}
    with pytest.raises(UserError, match=r"finetune: .*for 1 cannot be fitted to 3, only one"):
        study.run_study(tiny_study(**changes), tmp_path / "study")
    assert not (tmp_path / "study").exists()
