"""The directory of a run: one run at a time, and what may change when it resumes."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from test_train import tiny_config

from kdgqa_jax import config, study, train, workdir
from kdgqa_jax.errors import UserError

HOLDER = """
import sys, time
from kdgqa_jax import workdir
with workdir.held(sys.argv[1], {"seed": 1}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_place_are_refused_until_the_first_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        expected = f"is in use by process {holder.pid} on {socket.gethostname()}; wait for its end"
        for name in ("run", "run/../run"):
            with pytest.raises(UserError, match=expected), workdir.held(tmp_path / name, {}):
                pass
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 1}
        holder.send_signal(signal.SIGKILL)
    with workdir.held(tmp_path / "run", {"seed": 1}) as place:
        assert place == tmp_path / "run"


def test_training_holds_its_workdir_and_lets_go_of_it(tmp_path):
    place = tmp_path / "run"
    with workdir.held(place, {}, may_change=tiny_config().keys()):
        before = sorted(place.iterdir())
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "):
            train.train_and_evaluate(tiny_config(), place)
        assert sorted(place.iterdir()) == before
    with pytest.raises(UserError, match="another config"):  # which is where it fails now
        train.train_and_evaluate(tiny_config(), place)
    with workdir.held(place, {}):  # nor does what has failed hold it
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_breaks_no_run(tmp_path, monkeypatch, number):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)
    with workdir.held(tmp_path, {"seed": 1}), workdir.held(tmp_path, {"seed": 1}) as place:
        assert place == tmp_path


def test_a_record_that_may_change_becomes_the_new_one(tmp_path):
    first, second = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}
    workdir.claim(tmp_path, first)
    with pytest.raises(UserError, match=r"another config \(a\.c: 2 there, 5 here\)"):
        workdir.claim(tmp_path, second)
    workdir.claim(tmp_path, second, ["a.c"])
    assert json.loads((tmp_path / "config.json").read_text()) == second
    workdir.claim(tmp_path, first, ["a"])


def test_fields_that_did_not_exist_when_a_run_began_had_their_defaults(tmp_path):
    defaults = {"a": {"b": 0, "c": 2}, "d": 4}
    workdir.claim(tmp_path, {"a": {"b": 1}})
    with pytest.raises(UserError, match=r"another config \(a\.c: 2 there, 5 here\)"):
        workdir.claim(tmp_path, {"a": {"b": 1, "c": 5}, "d": 4}, (), defaults)
    with pytest.raises(UserError, match=r"another config \(a\.b: 1 there, 0 here\)"):
        workdir.claim(tmp_path, defaults, (), defaults)
    workdir.claim(tmp_path, {"a": {"b": 1, "c": 2}, "d": 4}, (), defaults)


# --- studies ------------------------------------------------------------------------------------


@pytest.fixture
def no_stages(monkeypatch):
    """A study checks, holds and records, and runs none of its stages."""
    monkeypatch.setattr(study.jobs, "run", lambda *_: {})
    monkeypatch.setattr(study, "_records", lambda *_: [])
    monkeypatch.setattr(study, "_write", lambda *_: None)


def changed(*fields):
    settings = config.load_config("demo:dataset=digits")
    return config.override(settings, [f"--config.{field}" for field in fields])


def test_a_study_holds_its_workdir(no_stages, tmp_path):
    study.run_study(changed(), tmp_path)
    with workdir.held(tmp_path, changed().to_dict()), pytest.raises(UserError, match="is in use"):
        study.run_study(changed(), tmp_path)


SETTLED = {
    "seed42/pretrained": ("pretrain.optim.learning_rate=0.5",),
    "seed42/gqa/converted": ("uptrain.epochs=3", "pooling=first", "num_kv_heads=2"),
    "seed42/gqa/finetuned": ("finetune.optim.learning_rate=0.5",),
}
"""Folders in the order in which they come, and what they settle."""


def test_stages_that_have_not_begun_may_change(no_stages, tmp_path):
    study.run_study(changed(), tmp_path)
    for folder, fields in SETTLED.items():
        study.run_study(changed(*fields), tmp_path)
        study.run_study(changed(), tmp_path)
        (tmp_path / folder).mkdir(parents=True)
        for field in fields:
            with pytest.raises(UserError, match=f"another config .{field.partition('=')[0]}: "):
                study.run_study(changed(field), tmp_path)
    for field in ("seed=1", "calibration_images=8", "uptrain_steps=7"):
        with pytest.raises(UserError, match="another config"):
            study.run_study(changed(field), tmp_path)


def test_what_may_change_in_a_run_may_change_in_every_stage_of_a_study(no_stages, tmp_path):
    study.run_study(changed(), tmp_path)
    for folder in SETTLED:
        (tmp_path / folder).mkdir(parents=True)
    values = {"mesh": "mesh.fsdp=1", "logs": "logs.tensorboard=true", "data.on_device": "{}=true"}
    values |= {"on_nonfinite": "{}=skip", "accumulate": "{}=2", "model.scan_layers": "{}=true"}
    values |= {"model.remat": "{}=full", "model.implementation": "{}=xla"}
    values |= {"model.expansion": "{}=gather"}
    for stage in ("pretrain", "uptrain", "finetune"):
        given = [f"{stage}.{values.get(f, '{}=3').format(f)}" for f in train.MAY_CHANGE]
        study.run_study(changed(*given), tmp_path)
        recorded = json.loads((tmp_path / "config.json").read_text())
        assert recorded[stage]["on_nonfinite"] == "skip" and recorded[stage]["microbatch"] == 3
    study.run_study(changed("seeds=3", "variants=gqa"), tmp_path)
