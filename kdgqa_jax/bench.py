"""What things cost on this machine: a training step of each variant, a conversion."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from kdgqa_jax import config as config_lib
from kdgqa_jax import convert, memory, sharding, starting, train, train_step, vit
from kdgqa_jax.console import table
from kdgqa_jax.errors import UserError, one_line

MIB = 2**20


def abstract_train_step(
    config: ml_collections.ConfigDict, num_classes: int = 1000, channels: int = 3
) -> tuple[Callable[..., Any], train_step.TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(jitted step, abstract state, abstract batch) of a config; nothing is allocated."""
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    model = starting.build_model(config, num_classes)
    step = train_step.make_train_step(model, train_step.step_config(config), 1000, mesh)
    rng = jax.random.key(config.seed)
    state = jax.eval_shape(
        lambda: train_step.init_state(vit.init_variables(model, rng, channels), config, rng)
    )
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *model.image_shape, channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    return step, state, batch


def bench_train(
    config: ml_collections.ConfigDict, variants: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """Compile one training step per variant, run it `steps` times (0: compile only), print a table.

    The steps of the variants take turns, so that what else the machine does falls on all alike.

    Returns:
      Per variant: temp_bytes (temporary memory of the step), state_bytes, compile_seconds, and with
      `steps` the fastest step in step_seconds.
    """
    for variant in variants:  # all of them, before the first one takes its time
        config.model.attention = variant
        train.check(config)
        image_shape = starting.build_model(config, num_classes=1000).image_shape
        memory.check_batch("batch_size", config.batch_size, (*image_shape, 3))
    results, runs = [], []
    for variant in variants:
        config.model.attention = variant
        started = time.monotonic()
        step, state, batch = abstract_train_step(config)
        compiled = step.lower(state, batch).compile()
        needed = compiled.memory_analysis()
        results.append(
            {
                "variant": variant,
                "temp_bytes": needed.temp_size_in_bytes,
                "state_bytes": needed.argument_size_in_bytes,
                "compile_seconds": time.monotonic() - started,
            }
        )
        if steps:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state, batch))
            shardings, _ = compiled.input_shardings
            runs.append([compiled, *jax.device_put(zeros, shardings), float("inf")])
    for _ in range(steps):
        for run in runs:
            compiled, state, batch, fastest = run
            started = time.monotonic()
            state, _ = jax.block_until_ready(compiled(state, batch))
            run[1], run[3] = state, min(fastest, time.monotonic() - started)
    for result, run in zip(results, runs, strict=False):
        result["step_seconds"] = run[3]
    _print(results, config)
    return results


def _print(results: list[dict[str, Any]], config: ml_collections.ConfigDict) -> None:
    device = jax.devices()[0]
    title = f"{config.model.name}, batch {config.batch_size}, {config.model.dtype}"
    timed = "step_seconds" in results[0]
    header = ["variant", "temporary MiB", "ratio", "state MiB", "compile s"]
    first, rows = results[0], []
    for result in results:
        row = [
            result["variant"],
            f"{result['temp_bytes'] / MIB:,.0f}",
            f"{result['temp_bytes'] / first['temp_bytes']:.3f}",
            f"{result['state_bytes'] / MIB:,.0f}",
            f"{result['compile_seconds']:.0f}",
        ]
        if timed:
            seconds = result["step_seconds"]
            row += [f"{seconds:.3f}", f"{seconds / first['step_seconds']:.3f}"]
        rows.append(row)
    title = f"training step: {title}, {device.device_kind} ({device.platform})"
    table(header + ["step s", "ratio"] * timed, rows, title, numbers=True)


def bench_config(model: str, num_kv_heads: int | None, batch_size: int, dtype: str) -> Any:
    """The training config that `kdgqa bench train` measures."""
    config = config_lib.train_config()
    config.model.name = model
    config.model.num_kv_heads = num_kv_heads
    config.model.dtype = dtype
    config.batch_size = batch_size
    return config


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
        command += ["--pooling", pooling, "--num-heads", str(vision.attention["num_heads"])]
        if calibration_images:
            images = pathlib.Path(folder) / "images"
            images.mkdir()
            for i in range(calibration_images):
                pixels = rng.integers(0, 256, (*vision.image_shape, 3), np.uint8)
                Image.fromarray(pixels).save(images / f"{i:05d}.png")
            command += ["--calibration", str(images)]
            command += ["--calibration-images", str(calibration_images)]
        started = time.monotonic()
        told = pathlib.Path(folder) / "told"
        with told.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status:
            reason = one_line(told.read_text()) or f"status {os.waitstatus_to_exitcode(status)}"
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
