"""Training through the command line survives kills, preemption, bad data and bad disks."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
import source_helpers
from PIL import Image

from kdgqa_jax import checkpoint, config, logs, train
from kdgqa_jax.data import idx
from kdgqa_jax.errors import UserError

CONFIG = """
from kdgqa_jax.config import parse_arg, train_config


def get_config(arg=""):
    arg = parse_arg(arg, steps=30, every=4)
    config = train_config()
    config.model.name, config.model.image_size = "mu/4", 8
    config.model.attention, config.model.window = "dgqa_ema", 4
    config.model.scan_layers, config.model.drop_path = True, 0.1
    config.data.augment.rand_augment_ops = 0
    config.data.augment.flip, config.data.augment.pad_crop = True, 1
    config.data.augment.mixup, config.ema_decay = 0.2, 0.9
    config.optim.learning_rate = 5e-5
    config.batch_size, config.eval_batch_size = 32, 64
    config.epochs, config.eval_every_epochs = arg.steps * 32 / 320, 0.0
    config.data.name, config.data.data_dir = "mnist", DATA_DIR
    config.checkpoint_every, config.log_every = arg.every, 1
    return config
"""
TIMES = ("images_per_second", "step_seconds", "data_seconds")
GROUPING = ("allocation", "key_norm", "loss")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def write_config(folder):
    """Its data are 320 images in IDX files: for `digits` each process would import scikit-learn."""
    images, labels = source_helpers.noise(0, 384, 8, 8), source_helpers.noise(1, 384) % 10
    arrays = images[:320], labels[:320], images[320:], labels[320:]
    for file, array in zip(idx.FILES, arrays, strict=True):
        source_helpers.write_idx(folder / file, array)
    (folder / "run.py").write_text(CONFIG.replace("DATA_DIR", repr(str(folder))))
    return folder / "run.py"


def start(config_file, workdir, *flags, arg="", devices=1, before=()):
    """`kdgqa train` in a process of its own."""
    name = f"{config_file}:{arg}" if arg else f"{config_file}"
    command = [sys.executable, "-m", "kdgqa_jax.cli", "train", "--config", name]
    return subprocess.Popen(
        [*before, *command, "--workdir", str(workdir), *flags],
        env=helpers.child_environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def steps_done(workdir):
    """Updates that are in the metrics by now."""
    try:
        return (workdir / "metrics.jsonl").read_text().count('"split": "train"')
    except FileNotFoundError:
        return 0


def wait_for_step(process, workdir, step):
    while steps_done(workdir) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def records(workdir):
    return [
        {k: v for k, v in r.items() if k not in TIMES}
        for r in logs.read_metrics(pathlib.Path(workdir))
    ]


def assert_same_run(workdir, other):
    for name in ("params", "norm_stats"):
        trees = [checkpoint.load_model(w / "model")[1][name] for w in (workdir, other)]
        flat = [train.jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
        for (path, a), (_, b) in zip(*flat, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert records(workdir) == records(other)


# --- exactly the same run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory):
    """The workdir of 30 steps in one go."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(config_file, workdir))
    return workdir


@pytest.mark.slow
def test_five_kills_change_no_bit(config_file, whole, tmp_path):
    moments = random.Random(0)
    for step in sorted(moments.sample(range(1, 29), 5)):
        process = start(config_file, tmp_path)
        wait_for_step(process, tmp_path, step)
        time.sleep(moments.uniform(0.0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "result.json").exists()
    finish(start(config_file, tmp_path))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_three_preemptions_change_no_bit(config_file, whole, tmp_path):
    """SIGTERM saves the step that is being done and ends with status 143."""
    for step in (2, 11, 21):
        process = start(config_file, tmp_path)
        wait_for_step(process, tmp_path, step)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 143
        assert "stopped as asked" in err and "Traceback" not in err
        saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert saved == steps_done(tmp_path)
    out = finish(start(config_file, tmp_path))
    assert f"resuming from step {saved} of 30" in out
    assert_same_run(tmp_path, whole)


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
    assert_same_run(workdir, whole)


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
        process = start(config_file, place, before=["bash", "-c", 'ulimit -f 100; exec "$@"', "_"])
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        last = err.strip().splitlines()[-1]
        assert last.startswith("kdgqa train: ") and what in last and "File too large" in last
        assert "cannot be written (" in last and "Traceback" not in err
    assert [p.name for p in (workdir / "checkpoints").glob("[0-9]*")] == ["28"]
    assert not (workdir / "result.json").exists()
    finish(start(config_file, workdir))
    assert_same_run(workdir, whole)


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
        start(
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
    finish(start(config_file, alone, arg=arg))
    for victim, (step, flags) in enumerate([(3, ()), (7, fsdp)]):
        processes = start_two(config_file, together, *flags, arg=arg)
        left = processes[1 - victim]
        wait_for_step(left, together, step)
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
        {name: np.array([r[name] for r in records(run) if name in r]) for name in GROUPING}
        for run in (alone, together)
    )
    helpers.assert_close(ones, twos, 1e-5)  # norms are those of the global batch
    assert ones["loss"].shape == (11,) and ones["key_norm"].shape == (10, 4, 4)
    # Another number of devices and another mesh restore it.
    shutil.rmtree(together / "model")
    before = json.loads((together / "result.json").read_text())
    (together / "result.json").unlink()
    finish(start(config_file, together, arg=arg))
    after = json.loads((together / "result.json").read_text())
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)


def finish_both(processes):
    return "".join([finish(process) for process in processes])
