"""Runs of `kdgqa train` in processes of their own: started, waited for, compared."""

import subprocess
import sys
import time

import helpers
import jax
import numpy as np
import source_helpers

from kdgqa_jax import checkpoint, logs
from kdgqa_jax.data import idx

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
    return [{k: v for k, v in r.items() if k not in TIMES} for r in logs.read_metrics(workdir)]


def assert_same_run(workdir, other):
    for name in ("params", "norm_stats"):
        trees = [checkpoint.load_model(w / "model")[1][name] for w in (workdir, other)]
        flat = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
        for (path, a), (_, b) in zip(*flat, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
    assert records(workdir) == records(other)
