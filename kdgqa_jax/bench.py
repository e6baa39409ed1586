"""Variants side by side on this device: memory of the compiled training step, and its rate."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from rich.console import Console
from rich.table import Table

from kdgqa_jax import config as config_lib
from kdgqa_jax import sharding, train, vit

MIB = 2**20


def compile_train_step(
    config: ml_collections.ConfigDict, num_classes: int = 1000, channels: int = 3
) -> tuple[jax.stages.Compiled, train.TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(compiled step, abstract state, abstract batch) of a config; nothing is allocated."""
    mesh = sharding.make_mesh()
    model = train.build_model(config, num_classes)
    optim_config = ml_collections.FrozenConfigDict(config.optim)
    step = train.make_train_step(model, optim_config, 1000, config.data.mean, config.data.std, mesh)
    variables = jax.eval_shape(lambda: vit.init_variables(model, jax.random.key(0), channels))
    rng = jax.random.key(config.seed)
    state = jax.eval_shape(lambda v: train.init_state(v, optim_config, rng), variables)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *model.image_shape, channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    return step.lower(state, batch).compile(), state, batch


def bench_train(
    config: ml_collections.ConfigDict, variants: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """Compile one training step per variant, run it `steps` times (0: compile only), print a table.

    The steps of the variants take turns, so that what else the machine does falls on all alike.

    Returns:
      Per variant: temp_bytes (temporary memory of the step), state_bytes, compile_seconds, and with
      `steps` the fastest step in step_seconds.
    """
    results, runs = [], []
    for variant in variants:
        config.model.attention = variant
        started = time.monotonic()
        compiled, state, batch = compile_train_step(config)
        memory = compiled.memory_analysis()
        results.append(
            {
                "variant": variant,
                "temp_bytes": memory.temp_size_in_bytes,
                "state_bytes": memory.argument_size_in_bytes,
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
    table = Table(title=f"training step: {title}, {device.device_kind} ({device.platform})")
    columns = ["variant", "temporary MiB", "ratio", "state MiB", "compile s"]
    timed = "step_seconds" in results[0]
    for i, column in enumerate(columns + ["step s", "ratio"] * timed):
        table.add_column(column, justify="right" if i else "left")
    first = results[0]
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
        table.add_row(*row)
    Console().print(table)


def bench_config(model: str, num_kv_heads: int | None, batch_size: int, dtype: str) -> Any:
    """The training config that `kdgqa bench train` measures."""
    config = config_lib.train_config()
    config.model.name = model
    config.model.num_kv_heads = num_kv_heads
    config.model.dtype = dtype
    config.batch_size = batch_size
    return config
