"""Training through the command line survives kills, preemption, bad data and bad disks."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import time

import helpers
import numpy as np
import pytest
import run_helpers as runs
from PIL import Image

from kdgqa_jax import checkpoint, config, train
from kdgqa_jax.errors import UserError

GROUPING = ("allocation", "key_norm", "loss")


# --- exactly the same run -----------------------------------------------------------------------


@pytest.mark.slow
def test_five_kills_change_no_bit(config_file, whole, tmp_path):
    moments = random.Random(0)
    for step in sorted(moments.sample(range(1, 29), 5)):
        process = runs.start(config_file, tmp_path)
        runs.wait_for_step(process, tmp_path, step)
        time.sleep(moments.uniform(0.0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "result.json").exists()
    runs.finish(runs.start(config_file, tmp_path))
    runs.assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_three_preemptions_change_no_bit(config_file, whole, tmp_path):
    """SIGTERM saves the step that is being done and ends with status 143."""
    for step in (2, 11, 21):
        process = runs.start(config_file, tmp_path)
        runs.wait_for_step(process, tmp_path, step)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 143
        assert "stopped as asked" in err and "Traceback" not in err
        saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert saved == runs.steps_done(tmp_path)
    out = runs.finish(runs.start(config_file, tmp_path))
    assert f"resuming from step {saved} of 30" in out
    runs.assert_same_run(tmp_path, whole)


# --- damaged checkpoints ------------------------------------------------------------------------


def unfinished(whole, place):
    """A copy of the run as it was when its last checkpoint had been written, and no more."""
    shutil.copytree(whole, place)
    (place / "result.json").unlink()
    shutil.rmtree(place / "model")
    return place


def load(config_file, **changes):
    settings = config.load_config(str(config_file))
    settings.update_from_flattened_dict(changes)
    return settings


def data_file(step_folder):
    """The largest file of a checkpoint, which holds the arrays."""
    return max((p for p in step_folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, pathlib.Path.unlink, flip_a_bit])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
    config_file, whole, tmp_path, capfd, damage
):
    workdir = unfinished(whole, tmp_path / "run")
    damage(data_file(workdir / "checkpoints" / "30"))
    train.train_and_evaluate(load(config_file), workdir)
    out, err = capfd.readouterr()
    assert f"checkpoint of step 30 in {workdir / 'checkpoints'} is damaged" in out
    assert "resuming from step 28 of 30" in out
    assert "Traceback" not in err
    assert (workdir / "damaged_checkpoint_30").is_dir()
    runs.assert_same_run(workdir, whole)


def test_when_no_checkpoint_can_be_read_no_run_starts_over(config_file, whole, tmp_path):
    workdir = unfinished(whole, tmp_path / "run")
    for folder in (workdir / "checkpoints").iterdir():
        cut(data_file(folder))
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read; delete that folder"):
        train.train_and_evaluate(load(config_file), workdir)


@pytest.mark.slow
def test_a_full_disk_is_reported_and_older_checkpoints_stay(config_file, whole, tmp_path):
    """A limit on the size of files, which the metrics stay below and a checkpoint does not."""
    workdir = unfinished(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "30")

    # The first checkpoint does not fit; where only the end is left, nor does the model.
    for place, what in ((tmp_path / "new", "a checkpoint in"), (workdir, "model")):
        process = runs.start(
            config_file, place, before=["bash", "-c", 'ulimit -f 100; exec "$@"', "_"]
        )
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        last = err.strip().splitlines()[-1]
        assert last.startswith("kdgqa train: ") and what in last and "File too large" in last
        assert "cannot be written (" in last and "Traceback" not in err
    assert [p.name for p in (workdir / "checkpoints").glob("[0-9]*")] == ["28"]
    assert not (workdir / "result.json").exists()
    runs.finish(runs.start(config_file, workdir))
    runs.assert_same_run(workdir, whole)


# --- bad data -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_image_that_cannot_be_read_stops_the_run_and_keeps_what_is_saved(config_file, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)

    def save_pictures():
        for split in ("train", "val"):
            for i, pixels in enumerate(pictures):
                path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)

    save_pictures()
    settings = load(
        config_file,
        **{"data.name": f"folder:{tmp_path / 'data'}", "batch_size": 1, "eval_batch_size": 1,
           "epochs": 2.0, "checkpoint_every": 1},
    )  # fmt: skip
    read = train.pipeline.TrainBatches.__next__

    def read_until_the_file_breaks(self):
        if self.get_state()["batches"] == 4:
            self.set_state(self.get_state())  # forget what was read ahead
            for path in (tmp_path / "data" / "train").rglob("*.png"):
                path.write_bytes(path.read_bytes()[:40])
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.pipeline.TrainBatches, "__next__", read_until_the_file_breaks)
        with pytest.raises(UserError, match=r"\.png: not an image that can be read"):
            train.train_and_evaluate(settings, tmp_path / "run")
    assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == 4
    save_pictures()
    assert train.train_and_evaluate(settings, tmp_path / "run")["steps"] == 16


@pytest.mark.slow
def test_numbers_that_are_not_finite_stop_the_run(config_file, tmp_path):
    settings = load(config_file, **{"optim.learning_rate": 1e30, "epochs": 12 * 32 / 320})
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(settings, tmp_path)
    text = str(error.value)
    assert "loss or gradients of step" in text and "on_nonfinite=skip" in text
    assert "\n" not in text and "learning rate 1e+30" in text
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "model").exists()


# --- several processes --------------------------------------------------------------------------


def start_two(config_file, workdir, *flags, arg):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        runs.start(
            config_file,
            workdir,
            "--multihost",
            "--coordinator",
            f"127.0.0.1:{port}",
            "--num-processes",
            "2",
            "--process-id",
            str(i),
            *flags,
            arg=arg,
            devices=2,
        )
        for i in range(2)
    ]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(config_file, tmp_path):
    """Data parallel, then FSDP: one process is killed, then the other, and both resume."""
    arg, together, alone = "steps=10,every=2", tmp_path / "two", tmp_path / "one"
    fsdp = ("--config.mesh.fsdp=4",)
    runs.finish(runs.start(config_file, alone, arg=arg))
    for victim, (step, flags) in enumerate([(3, ()), (7, fsdp)]):
        processes = start_two(config_file, together, *flags, arg=arg)
        left = processes[1 - victim]
        runs.wait_for_step(left, together, step)
        os.killpg(processes[victim].pid, signal.SIGKILL)
        killed = time.monotonic()
        _, err = left.communicate(timeout=90)
        assert time.monotonic() - killed < 60
        assert left.returncode == 1
        last = err.strip().splitlines()[-1]
        assert "of this run has ended" in last and "start all of them again" in last
        processes[victim].communicate()
    out = finish_both(start_two(config_file, together, *fsdp, arg=arg))
    assert "resuming from step" in out

    one, two = (checkpoint.load_model(run / "model")[1] for run in (alone, together))
    helpers.assert_close(one["norm_stats"], two["norm_stats"], 1e-5)
    # What key biases gain is rounding alone: their gradient is zero.
    scale = helpers.largest(one["params"])
    helpers.assert_close(one["params"], two["params"], 1e-6, scale=scale)
    ones, twos = (
        {name: np.array([r[name] for r in runs.records(run) if name in r]) for name in GROUPING}
        for run in (alone, together)
    )
    helpers.assert_close(ones, twos, 1e-5)  # norms are those of the global batch
    assert ones["loss"].shape == (11,) and ones["key_norm"].shape == (10, 4, 4)
    # Another number of devices and another mesh restore it.
    shutil.rmtree(together / "model")
    before = json.loads((together / "result.json").read_text())
    (together / "result.json").unlink()
    runs.finish(runs.start(config_file, together, arg=arg))
    after = json.loads((together / "result.json").read_text())
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)


def finish_both(processes):
    return "".join([runs.finish(process) for process in processes])
