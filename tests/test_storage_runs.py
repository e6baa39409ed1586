"""Runs whose data, model and workdir are on object storage, killed and resumed."""

import json
import os
import pathlib
import random
import signal
import time

import helpers
import pytest
import run_helpers as runs
import stores
from test_study import tiny_study

from kdgqa_jax import checkpoint, cli, dry_run, paths, report, state_checkpoints, storage
from kdgqa_jax import study as study_lib
from kdgqa_jax.data import idx


@pytest.fixture(scope="module", params=stores.STORES)
def store(request, tmp_path_factory):
    with stores.running(request.param, tmp_path_factory.mktemp("cache")) as store:
        yield store


def remote_data(store, config_file):
    """The flag that takes the data of the config from the bucket."""
    place = paths.place(f"{store.root}/data")
    storage.upload({config_file.parent / file: place / file for file in idx.FILES})
    return f"--config.data.data_dir={place}"


def saved(workdir):
    """Steps that are saved; of one that is being saved a half."""
    place = workdir / "checkpoints"
    found = {p.name for p in place.iterdir()} if place.exists() else set()
    complete = {int(name) for name in state_checkpoints._complete(workdir / "checkpoints")}
    return max(complete, default=0) + (len(found) > len(complete)) / 2


def kill_after(process, workdir, step, moments):
    while saved(workdir) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(moments.uniform(0.0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_kills_change_no_bit(config_file, whole, store):
    """Five at gs://, where Orbax writes itself, two at s3://, of steps saved and half saved."""
    workdir, moments = paths.place(f"{store.root}/run"), random.Random(0)
    data = remote_data(store, config_file)
    steps = (3.5, 8, 11.5, 20, 23.5) if store.scheme == "gs" else (4, 15.5)
    for step in steps:
        kill_after(runs.start(config_file, str(workdir), data), workdir, step, moments)
    assert not (workdir / "result.json").exists()
    out = runs.finish(runs.start(config_file, str(workdir), data))
    assert "resuming from step" in out
    runs.assert_same_run(workdir, whole)

    # What is there is evaluated and converted, and the results go there.
    place, bucket = f"{workdir}/model", f"{store.root}/data"
    evaluated, converted = f"{store.root}/figures.json", f"{store.root}/converted"
    evaluate = ["evaluate", "--checkpoint", place, "--dataset", "mnist", "--data-dir", bucket]
    assert cli.main([*evaluate, "--out", evaluated]) == 0
    here = json.loads((whole / "result.json").read_text())
    there = json.loads(paths.place(evaluated).read_text())
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-6)
    convert = ["convert", "--source", place, "--attention", "gqa", "--out", converted]
    assert cli.main(convert) == 0
    assert checkpoint.load_model(converted)[0].attention.variant == "gqa"
    assert not pathlib.Path(f"{store.scheme}:").exists()  # made of a path that is none


@pytest.mark.slow
def test_a_bucket_that_begins_to_refuse_writes_loses_nothing(config_file, whole, store):
    workdir = paths.place(f"{store.root}/refused")
    data = remote_data(store, config_file)
    process = runs.start(config_file, str(workdir), data)
    while saved(workdir) < 8:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    store.refuses = True
    try:
        _, err = process.communicate(timeout=120)
    finally:
        store.refuses = False
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("kdgqa train: ") and str(workdir) in last and "cannot be" in last
    assert "Traceback" not in err
    assert saved(workdir) >= 8
    runs.finish(runs.start(config_file, str(workdir), data))
    helpers.assert_close(
        checkpoint.load_model(workdir / "model")[1], checkpoint.load_model(whole / "model")[1], 0.0
    )


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_a_study_resumes_and_is_reported(store, tmp_path, capsys):
    """Its results are those of a local one, to the byte."""
    config = tiny_study(**{"finetune.epochs": 0.0})
    study_lib.run_study(config, tmp_path / "local")
    config.variants = ("gqa",)
    study_lib.run_study(config, f"{store.root}/study")
    config.variants = ("gqa", "kdgqa")
    capsys.readouterr()
    dry_run.show(config, f"{store.root}/study")
    assert "5 stages" in (said := capsys.readouterr().out) and "3 are finished" in said
    study_lib.run_study(config, f"{store.root}/study")
    place = paths.place(f"{store.root}/study")
    for name in ("results.json", "results.csv", "accuracy.svg"):
        local = (tmp_path / "local" / "report" / name).read_bytes()
        assert (place / "report" / name).read_bytes() == local, name
    assert not (place / "seed42" / "gqa" / "uptrained" / "checkpoints").exists()
    storage.remove(place / "report" / "report.html")
    assert report.build(str(place)) == place / "report"
    page = (place / "report" / "report.html").read_text()
    assert "allocation" in page and "gs:" not in page.partition("<table")[0]
