"""Time and memory of a conversion."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from kdgqa_jax import convert, vit
from kdgqa_jax.console import table
from kdgqa_jax.errors import UserError, one_line

MIB = 2**20


def bench_convert(
    model: str, pooling: str = "mean", calibration_images: int = 0
) -> dict[str, float]:
    """Convert a random checkpoint of a size, timm's layout, by the command line; print a table.

    Args:
      model: SIZE/PATCH.
      pooling: a name in `convert.POOLING` or `convert.MERGING`.
      calibration_images: random images that calibrate it, as files; 0: none.

    Returns:
      file_bytes, peak_bytes (resident memory of the converting process), seconds (of the process,
      imports included).
    """
    from safetensors.numpy import save_file

    vision = vit.create(model, num_classes=1000)
    shapes = jax.eval_shape(lambda: vit.init_variables(vision, jax.random.key(0)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), shapes)
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "timm.safetensors"
        save_file(convert.to_pytorch(vision, variables), source)
        del variables
        command = [sys.executable, "-m", "kdgqa_jax.cli", "convert", "--attention", "gqa"]
        command += ["--source", str(source), "--out", str(pathlib.Path(folder) / "model")]
        command += ["--pooling", pooling, "--num-heads", str(vision.attention.num_heads)]
        if calibration_images:
            images = pathlib.Path(folder) / "images"
            images.mkdir()
            for i in range(calibration_images):
                pixels = rng.integers(0, 256, (*vision.image_shape, 3), np.uint8)
                Image.fromarray(pixels).save(images / f"{i:05d}.png")
            command += ["--calibration", str(images)]
            command += ["--calibration-images", str(calibration_images)]
        started = time.monotonic()
        log = pathlib.Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status:
            reason = one_line(log.read_text()) or f"status {os.waitstatus_to_exitcode(status)}"
            raise UserError(f"converting a random {model} failed ({reason})")
        size, peak = source.stat().st_size, usage.ru_maxrss * 1024
    row = [
        model,
        f"{size / MIB:,.0f}",
        f"{peak / MIB:,.0f}",
        f"{peak / size:.2f}",
        f"{seconds:.1f}",
    ]
    header = ["model", "file MiB", "peak memory MiB", "ratio", "seconds"]
    title = f"kdgqa convert --attention gqa --pooling {pooling}"
    title += f", {calibration_images} calibration images" if calibration_images else ""
    table(header, [row], title, numbers=True)
    return {"file_bytes": size, "peak_bytes": peak, "seconds": seconds}
