"""Training: pretraining, uptraining and fine-tuning are one loop with different configs."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kdgqa_jax import (
    checkpoint,
    fitting,
    initial,
    memory,
    optim,
    options,
    paths,
    processes,
    sharding,
    state_checkpoints,
    vit,
)
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.console import ProgressBar, say
from kdgqa_jax.data import augment, identity, pipeline, subsets
from kdgqa_jax.data.dataset import Dataset, check_dataset
from kdgqa_jax.errors import LARGEST, Preempted, UserError, check_seed, unknown
from kdgqa_jax.evaluate import evaluate, make_eval_step
from kdgqa_jax.logs import MetricsWriter, check_packages, read_metrics
from kdgqa_jax.preemption import Preemption
from kdgqa_jax.train_step import ON_NONFINITE, TrainState, init_state, make_train_step, step_config
from kdgqa_jax.version import versions

Config: TypeAlias = ml_collections.ConfigDict

MAY_CHANGE = (
    "mesh",
    "accumulate",
    "microbatch",
    "data.workers",
    "data.on_device",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "logs",
    "on_nonfinite",
    *(f"model.{n}" for n in options.names(vit.known_options(), options.PROGRAM)),
)
"""Fields that may change when a run resumes, or in a stage of a study that does.

What is computed stays the same but for rounding, the random draws inside the model where other
parts of a batch are processed at once or layers are scanned, and what happens to numbers that are
not finite.
"""

BEST: dict[str, Callable[[Iterable[float]], float]] = {"top1": max, "top5": max, "loss": min}
"""Measures of the test split by which `keep_best` may choose, and what is best."""


def check(config: Config) -> jax.sharding.Mesh:
    """The mesh of a run. Raises UserError for a config that cannot be run."""
    if "pretrain" in config:
        raise UserError(
            "this config is one of a study, with several runs: kdgqa study --config ..."
        )
    config_lib.check_fields(config, config_lib.train_config())
    if config.init is None:
        raise UserError(
            "config field init is not set: give the model that this config starts from,"
            " --config.init=DIR (an empty one begins with new weights)"
        )
    check_seed(config.seed)
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    positive = ("epochs", "checkpoint_every", "keep_checkpoints", "log_every", "accumulate")
    for name in (*positive, "eval_every_epochs"):
        if config[name] < 0 or (config[name] == 0 and name in positive):
            raise UserError(f"config field {name}={config[name]} must be positive")
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    augment.check(config.data.augment)
    if not 0.0 <= config.ema_decay < 1.0:
        raise UserError(f"config field ema_decay={config.ema_decay} must be at least 0, below 1")
    for name, known in (("on_nonfinite", ON_NONFINITE), ("keep_best", ("", *BEST))):
        if config[name] not in known:
            raise unknown(name, config[name], [k for k in known if k])
    if config.data.workers < 0:
        raise UserError(f"config field data.workers={config.data.workers} must be 0 or more")
    if config.microbatch < fitting.AUTO:
        raise UserError(
            f"config field microbatch={config.microbatch} must be 0 or more, or {fitting.AUTO} for"
            " what fits the device"
        )
    optim.make_schedule(config.optim, 1)
    check_packages(**config.logs)
    return mesh


def check_batches(config: Config, image_shape: Sequence[int]) -> None:
    """Raise UserError for batches that this process cannot hold; images as hosts ship them."""
    for name in ("batch_size", "eval_batch_size"):
        memory.check_batch(name, config[name] // jax.process_count(), image_shape)


def count_steps(config: Config, images: int) -> int:
    """Updates of a run on so many images. Raises UserError for more than a counter can hold."""
    steps = config.epochs * images / config.batch_size
    if steps > LARGEST:
        raise UserError(
            f"config field epochs={config.epochs} makes {steps:.3g} steps of {images} images, more"
            f" than {LARGEST}"
        )
    return max(round(steps), 1)


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike,
    title: str = "train",
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Train by `config`, evaluate, and leave a model directory in `workdir/model`.

    A run that was stopped resumes from its newest checkpoint that can be read and ends with the
    same figures; one that has ended is not run again.

    Args:
      config: the fields of `config.train_config()`.
      workdir: gets config.json, checkpoints, metrics.jsonl, metrics.csv, model and result.json, and
        what `keep_best` and `logs` ask for; on storage that all processes see.
      title: shown beside the progress bar.
      dataset: taken instead of the one that `config.data` names; its name and an empty `data_dir`
        are in the records. To resume, give the same one again.

    Returns:
      The content of result.json: final top1, top5 (percent), loss and allocation on the test split,
      best_top1, steps, seconds (of the training loop, restarts included), skipped_updates,
      train_step_compilations.

    Raises:
      UserError: a bad config, data or workdir; loss or gradients that are not finite.
      Preempted: SIGTERM came, and the state is saved.
    """
    with contextlib.ExitStack() as held:  # until the run ends, however it does
        return _train_and_evaluate(config, paths.place(workdir, "workdir"), title, dataset, held)


def _train_and_evaluate(
    config: Config,
    workdir: paths.Path,
    title: str,
    dataset: Dataset | None,
    held: contextlib.ExitStack,
) -> dict[str, Any]:
    # --- Config, data and model -----------------------------------------------------------------
    mesh = check(config)
    config = config.copy_and_resolve_references()
    data = config.data
    if dataset is not None:
        check_dataset(dataset)
        data.name, data.data_dir = dataset.name, ""
    asked = config.to_dict()
    dataset = subsets.load(data, config.seed, dataset)
    data_now = identity.describe(dataset)
    steps_per_epoch = len(dataset.train) / config.batch_size
    num_steps = count_steps(config, len(dataset.train))
    eval_every = max(round(config.eval_every_epochs * steps_per_epoch), 1)
    channels, num_classes = dataset.image_shape[-1], len(dataset.class_names)
    initial_model = _initial_model(config, workdir, num_classes, channels)
    model = initial_model.build()
    data.update(initial_model.preprocessing)
    dataset = pipeline.prepare(dataset, model.image_shape, data)
    check_batches(config, dataset.image_shape)
    batches, fetch = pipeline.train_source(
        dataset.train, config.batch_size, config.seed, mesh, data.workers, data.on_device
    )

    init_rng, step_rng = jax.random.split(jax.random.key(config.seed))

    def begin(variables: dict[str, Any]) -> TrainState:
        return init_state(variables, config, step_rng)

    def begin_new() -> TrainState:
        return begin({"norm_stats": {}, **vit.init_variables(model, init_rng, channels)})

    shapes = jax.eval_shape(begin_new)
    shardings = sharding.by_rules(shapes, mesh)
    if initial_model.variables is not None:
        like = {"params": shapes.params, "norm_stats": shapes.norm_stats}
        initial.check_shapes(config.init, initial_model.variables, like)

    # --- Workdir --------------------------------------------------------------------------------
    first_process = jax.process_index() == 0
    hold = workdir_lib.held(workdir, asked, MAY_CHANGE, config_lib.train_config().to_dict())
    workdir = paths.place(processes.on_first_process(lambda: os.fspath(held.enter_context(hold))))
    identity.check(workdir, {"data": data_now})
    for name in ("model", "best"):
        checkpoint.check_replaceable(workdir / name)
    if (workdir / "result.json").exists():  # finished before
        return workdir_lib.read_json(workdir / "result.json")

    # --- State: new, from another model, or resumed ---------------------------------------------
    checkpoints = state_checkpoints.StateCheckpoints(
        workdir / "checkpoints", config.keep_checkpoints
    )
    restored = checkpoints.restore(state_checkpoints.abstract(shapes, shardings))
    seconds_before = 0.0
    if restored is not None:
        state, position = restored
        batches.set_state(position["data"])
        seconds_before = position["seconds"]
        if int(state.step) < num_steps:
            say(f"{title}: resuming from step {int(state.step)} of {num_steps}")
    elif config.init:
        state = jax.jit(begin, out_shardings=shardings)(initial_model.variables)
        for line in initial_model.notes:
            say(f"{title}: {line}")
        processes.on_first_process(lambda: initial.write(initial_model, workdir))
    else:
        state = jax.jit(begin_new, out_shardings=shardings)()
    initial_model = dataclasses.replace(initial_model, variables=None)  # frees them
    if config.on_nonfinite == "stop" and int(state.first_skipped):  # it was "skip" before
        state = jax.jit(_clear_skipped, donate_argnums=0, out_shardings=shardings)(state)

    # --- Loop -----------------------------------------------------------------------------------
    train_step = make_train_step(model, step_config(config), num_steps, mesh)
    eval_step = make_eval_step(model, *pipeline.statistics(data), mesh)
    schedule = optim.make_schedule(config.optim, num_steps)
    first_step = int(state.step)
    writer = MetricsWriter(
        workdir,
        first_step,
        enabled=first_process,
        config=asked,
        **config.logs,
    )
    # Without what comes after the step to resume from, which the first process drops meanwhile.
    tests = {
        r["step"]: r
        for r in read_metrics(workdir)
        if r["split"] == "test" and r["step"] <= first_step
    }
    started = time.monotonic()

    def position_now() -> dict[str, Any]:
        """Where the run is, beside the state."""
        seconds = seconds_before + time.monotonic() - started
        return {"data": batches.get_state(), "seconds": seconds}

    def check_finite(metrics: dict[str, jax.Array]) -> None:
        """Raise UserError if an update was left out and that is to stop the run."""
        if config.on_nonfinite == "stop" and int(metrics["first_skipped"]):
            newest = checkpoints.latest_step
            kept = (
                f"the checkpoint of step {newest} in {checkpoints.directory}" if newest else "none"
            )
            raise UserError(
                f"loss or gradients of step {int(metrics['first_skipped'])} are not"
                f" finite; the run stops, and its last good state is {kept}. Likely causes: the"
                f" learning rate {config.optim.learning_rate} is too high or has no warm-up,"
                " gradients are not clipped, model.dtype has too little range, images are damaged;"
                " --config.on_nonfinite=skip leaves such updates out and counts them"
            )

    def save_model(name: str, step: int) -> None:
        description = {
            "model": initial_model.model,
            "channels": channels,
            "class_names": list(dataset.class_names),
            "preprocessing": {name: data[name] for name in pipeline.PREPROCESSING},
            "trained_on": {"data": data.to_dict(), "steps": step, "init": config.init},
            "versions": versions(),
        }
        variables = sharding.to_host(state.variables, mesh)
        processes.on_first_process(
            lambda: checkpoint.save_model(workdir / name, variables, description)
        )

    def evaluate_now(step: int) -> dict[str, Any]:
        result = evaluate(eval_step, state.variables, dataset.test, config.eval_batch_size, mesh)
        if step not in tests:  # or it was stopped just after
            writer.write(step=step, epoch=step / steps_per_epoch, split="test", **result)
        tests[step] = result
        if config.keep_best and _is_best(result, tests.values(), config.keep_best):
            save_model("best", step)
        memory.trim_heap()
        return result

    progress = ProgressBar(title, num_steps, first_step)
    interval_step, interval_started, waited = first_step, time.monotonic(), 0.0
    with checkpoints, contextlib.closing(writer), contextlib.closing(batches):
        with progress as bar, Preemption() as preemption:
            for step in range(first_step + 1, num_steps + 1):
                asked_at = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked_at
                state, metrics = train_step(state, fetch(batch))
                ends = preemption.asked(step)
                note, last = "", step == num_steps
                if step % config.log_every == 0 or last:
                    check_finite(metrics)
                    values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
                    values.pop("first_skipped")
                    now, steps = time.monotonic(), step - interval_step
                    rate = config.batch_size * steps / (now - interval_started)
                    writer.write(
                        step=step,
                        epoch=step / steps_per_epoch,
                        split="train",
                        **values,
                        # of the last update that was made
                        learning_rate=float(schedule(max(step - values["skipped_updates"] - 1, 0))),
                        images_per_second=rate,
                        step_seconds=(now - interval_started) / steps,
                        data_seconds=waited / steps,
                    )
                    interval_step, interval_started, waited = step, now, 0.0
                    note = f"loss {values['loss']:.3f}, {rate:.0f} images/s"
                bar.update(step, note)
                evaluates = config.eval_every_epochs and step % eval_every == 0 and not last
                saves = ends or (step % config.checkpoint_every == 0 and not last)
                if evaluates or saves:
                    check_finite(metrics)
                    jax.block_until_ready(metrics)  # from here on, the time is not that of steps
                    paused = time.monotonic()
                    if evaluates:
                        evaluate_now(step)
                    if saves:
                        writer.flush()
                        checkpoints.save(step, state, position_now())
                        memory.trim_heap()
                    interval_started += time.monotonic() - paused
                if ends:
                    checkpoints.wait()
                    raise Preempted(f"stopped as asked; step {step} of {num_steps} is saved")

        # --- Result -----------------------------------------------------------------------------
        result = evaluate_now(num_steps)
        save_model("model", num_steps)
        result |= {
            "best_top1": max(t["top1"] for t in tests.values()),
            "steps": num_steps,
            "seconds": position_now()["seconds"],
            "skipped_updates": int(state.skipped),
            "train_step_compilations": train_step._cache_size(),  # type: ignore[attr-defined]
        }
        writer.flush()
        checkpoints.save(num_steps, state, position_now())
    processes.on_first_process(lambda: workdir_lib.write_json(workdir / "result.json", result))
    return result


def _clear_skipped(state: TrainState) -> TrainState:
    """The state as if no update had been left out so far; the count of them stays."""
    return dataclasses.replace(state, first_skipped=jnp.zeros_like(state.first_skipped))


def _is_best(result: dict[str, Any], tests: Iterable[dict[str, Any]], measure: str) -> bool:
    """If no test of the run is better by a name in `BEST`; NaN, None in records, is worst."""
    known = [t[measure] for t in tests if t[measure] is not None and np.isfinite(t[measure])]
    return bool(known) and result[measure] == BEST[measure](known)


def _initial_model(
    config: Config, workdir: paths.Path, num_classes: int, channels: int
) -> initial.InitialModel:
    """What the run starts, or has started, from."""
    if state_checkpoints.any_saved(workdir / "checkpoints"):
        return initial.read(workdir, config) or initial.load(config, num_classes, channels)
    return initial.load(config, num_classes, channels)
