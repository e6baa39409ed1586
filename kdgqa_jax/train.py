"""Training: pretraining, uptraining and fine-tuning are one loop with different configs."""

import contextlib
import csv
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from kdgqa_jax import checkpoint, layers, optim, sharding, vit
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import remember_key_gradients
from kdgqa_jax.console import ProgressBar, say
from kdgqa_jax.data import augment, pipeline, sources
from kdgqa_jax.errors import UserError
from kdgqa_jax.evaluate import evaluate, make_eval_step
from kdgqa_jax.version import versions

Array = jax.Array


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes: saved, restored and donated as a whole."""

    step: Array  # () int32, the number of updates done: the global optimizer step
    params: Any
    norm_stats: Any  # DGQA's memory; {} for variants without
    opt_state: Any
    rng: Array  # key data; the key of a step is folded from it and the step

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "norm_stats": self.norm_stats}


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> vit.VisionTransformer:
    """The model of `config.model`. Raises UserError for options that do not fit together."""
    return vit.create(**config.model.to_dict(), num_classes=num_classes)


def init_state(
    variables: dict[str, Any], optim_config: ml_collections.FrozenConfigDict, rng: Array
) -> TrainState:
    """The state before the first step, from the variables of a model; `rng` is a key."""
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        norm_stats=variables.get("norm_stats", {}),
        opt_state=optim.make_optimizer(optim_config, 1).init(params),
        rng=jax.random.key_data(rng),
    )


def statistics(data_config: ml_collections.ConfigDict) -> tuple[augment.Statistic, ...]:
    """(mean, std) of `config.data`, hashable."""
    frozen = input_of(data_config)
    return frozen.mean, frozen.std


def input_of(data_config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """What the device does with images: the part of `config.data` that a training step needs."""
    fields = {name: data_config[name] for name in ("mean", "std", "augment")}
    return ml_collections.FrozenConfigDict(fields)


@functools.lru_cache(maxsize=2)
def make_train_step(
    model: vit.VisionTransformer,
    optim_config: ml_collections.FrozenConfigDict,
    num_steps: int,
    input_config: ml_collections.FrozenConfigDict,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """A jitted (state, batch) -> (state, metrics) that donates the state.

    The same arguments give the same function, so that stages of a study share one compilation.
    Batches are split over the mesh, so sums over the batch, key norms among them, are global.

    Args:
      model: the ViT.
      optim_config: the fields of `config.optim`.
      num_steps: of the run; the schedule depends on it.
      input_config: mean, std and augment of `config.data`.
      mesh: the devices.
    """
    optimizer = optim.make_optimizer(optim_config, num_steps)

    def train_step(state: TrainState, batch: dict[str, Array]):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        dropout_rng, noise_rng, augment_rng = jax.random.split(rng, 3)
        labels = batch["label"]
        images, targets = augment.training_batch(
            batch["image"],
            labels,
            augment_rng,
            input_config.augment,
            model.image_shape,
            model.num_classes,
            input_config.mean,
            input_config.std,
        )

        def loss_fn(params):
            logits, collections = model.apply(
                {"params": params, "norm_stats": state.norm_stats},
                images,
                train=True,
                step=state.step,
                rngs={"dropout": dropout_rng, "noise": noise_rng},
                mutable=["norm_stats", "grouping"],
            )
            if targets.ndim == 1:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            else:
                losses = optax.softmax_cross_entropy(logits, targets)
            return losses.mean(), (logits, collections)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, collections)), grads = grad_fn(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        grouping = {  # (L, K); in example scope (L, B, K), logged as the mean over the batch
            name: x.mean(axis=1) if x.ndim == 3 else x
            for name, x in layers.grouping_of(collections).items()
        }
        metrics = {
            "loss": loss,
            "top1": 100 * jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            "grad_norm": optax.tree.norm(grads),
            "key_norm": grouping["key_norm"],
            "allocation": grouping["allocation"],
        }
        if "corrupt" in batch:
            metrics["corrupt_images"] = jnp.sum(batch["corrupt"])
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            norm_stats=remember_key_gradients(collections.get("norm_stats", {}), grads),
            opt_state=opt_state,
            rng=state.rng,
        )
        return new_state, metrics

    whole, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)
    return jax.jit(train_step, in_shardings=(whole, split), out_shardings=whole, donate_argnums=0)


class MetricsWriter:
    """metrics.jsonl with every value, and metrics.csv with the scalars among them.

    A run that goes on from step n drops the records after it, which it will write again.
    """

    COLUMNS = ("step", "epoch", "split", "loss", "top1", "top5", "learning_rate", "grad_norm",
               "images_per_second")  # fmt: skip

    def __init__(self, folder: pathlib.Path, step: int):
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        self._jsonl.write_text("".join(json.dumps(record) + "\n" for record in kept))
        with self._csv.open("w", newline="") as file:
            csv.writer(file).writerow(self.COLUMNS)
        for record in kept:
            self._append_csv(record)

    def _append_csv(self, record: dict[str, Any]) -> None:
        with self._csv.open("a", newline="") as file:
            csv.writer(file).writerow([record.get(column, "") for column in self.COLUMNS])

    def write(self, **record: Any) -> None:
        """Append one record; "step" is the number of updates done."""
        with self._jsonl.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._append_csv(record)


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, but for a last line that a kill has cut short."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _starting_variables(config: ml_collections.ConfigDict, fresh: dict[str, Any]) -> dict[str, Any]:
    """The variables of the model directory `config.init`; they must fit `fresh` in every shape."""
    _, loaded, _ = checkpoint.load_model(config.init)
    layout = layers.stack_layers if config.model.scan_layers else layers.unstack_layers
    loaded = {name: layout(tree) for name, tree in loaded.items()}
    loaded.setdefault("norm_stats", {})

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves
        }

    want, have = shapes(fresh), shapes(loaded)
    wrong = [
        f"{name} ({have.get(name, 'missing')} there, {want.get(name, 'not expected')} here)"
        for name in sorted(want.keys() | have.keys())
        if want.get(name) != have.get(name)
    ]
    if wrong:
        raise UserError(
            f"the model in {config.init} does not fit config.model: {'; '.join(wrong[:4])}"
            + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )
    return loaded


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, title: str = "train"
) -> dict[str, Any]:
    """Train by `config`, evaluate, and leave a model directory in `workdir/model`.

    A run that was stopped goes on from its newest checkpoint and ends with the same figures; one
    that has ended is not run again.

    Args:
      config: the fields of `config.train_config()`.
      workdir: gets config.json, checkpoints, metrics.jsonl, metrics.csv, model and result.json.
      title: shown beside the progress bar.

    Returns:
      The content of result.json: final top1, top5 (percent), loss and allocation on the test split,
      best_top1, steps, seconds (of the training loop, restarts included), train_step_compilations.

    Raises:
      UserError: a bad config, data or workdir.
    """
    # --- Config and workdir ---------------------------------------------------------------------
    if "pretrain" in config:
        raise UserError(
            "this config is one of a study, with several runs: kdgqa study --config ..."
        )
    config_lib.check_fields(config, config_lib.train_config())
    mesh = sharding.make_mesh()
    for name in ("batch_size", "eval_batch_size"):
        sharding.check_batch_size(name, config[name], mesh)
    augment.check(config.data.augment)
    for name in ("epochs", "eval_every_epochs", "checkpoint_every", "log_every"):
        if config[name] < 0 or (config[name] == 0 and name != "eval_every_epochs"):
            raise UserError(f"config field {name}={config[name]} must be positive")

    # --- Data -----------------------------------------------------------------------------------
    data = config.data
    dataset = sources.load(data.name, data.data_dir, data.shift)
    steps_per_epoch = len(dataset.train) / config.batch_size
    num_steps = max(round(config.epochs * steps_per_epoch), 1)
    eval_every = max(round(config.eval_every_epochs * steps_per_epoch), 1)

    # --- Model and schedule ---------------------------------------------------------------------
    model = build_model(config, len(dataset.class_names))
    dataset = pipeline.prepare(dataset, model.image_shape, data)
    batches, fetch = pipeline.train_source(
        dataset.train, config.batch_size, config.seed, mesh, data.workers, data.on_device
    )
    optim_config = ml_collections.FrozenConfigDict(config.optim)
    schedule = optim.make_schedule(config.optim, num_steps)
    channels = dataset.image_shape[-1]
    if config.init:
        checkpoint.check_model(config.init)
    workdir = workdir_lib.claim(workdir, config.to_dict())
    checkpoint.check_replaceable(workdir / "model")
    if (workdir / "result.json").exists():  # finished before
        return workdir_lib.read_json(workdir / "result.json")

    # --- State: fresh, from another model, or resumed -------------------------------------------
    init_rng, step_rng = jax.random.split(jax.random.key(config.seed))

    def start(variables: dict[str, Any]) -> TrainState:
        return init_state(variables, optim_config, step_rng)

    def fresh_variables() -> dict[str, Any]:
        return {"norm_stats": {}, **vit.init_variables(model, init_rng, channels)}

    whole, seconds_before = sharding.replicated(mesh), 0.0
    checkpoints = checkpoint.StateCheckpoints(workdir / "checkpoints")
    if checkpoints.latest_step is not None:
        shapes = jax.eval_shape(lambda: start(fresh_variables()))
        state, restored = checkpoints.restore(checkpoint.abstract(shapes, whole))
        batches.set_state(restored["data"])
        seconds_before = restored["seconds"]
        if int(state.step) < num_steps:
            say(f"{title}: going on from step {int(state.step)} of {num_steps}")
    elif config.init:
        variables = _starting_variables(config, jax.eval_shape(fresh_variables))
        state = jax.jit(start, out_shardings=whole)(variables)
    else:
        state = jax.jit(lambda: start(fresh_variables()), out_shardings=whole)()

    # --- Loop -----------------------------------------------------------------------------------
    train_step = make_train_step(model, optim_config, num_steps, input_of(data), mesh)
    eval_step = make_eval_step(model, *statistics(data))
    first_step = int(state.step)
    writer = MetricsWriter(workdir, first_step)
    started = interval_started = time.monotonic()
    interval_step = first_step

    def position() -> dict[str, Any]:
        """Where the run is, beside the state."""
        seconds = seconds_before + time.monotonic() - started
        return {"data": batches.get_state(), "seconds": seconds}

    def evaluate_now(step: int) -> dict[str, Any]:
        result = evaluate(eval_step, state.variables, dataset.test, config.eval_batch_size, mesh)
        writer.write(step=step, epoch=step / steps_per_epoch, split="test", **result)
        return result

    with contextlib.closing(checkpoints):  # even a run that fails waits for saves under way
        with ProgressBar(title, num_steps, first_step) as bar:
            for step in range(first_step + 1, num_steps + 1):
                state, metrics = train_step(state, fetch(next(batches)))
                if step % config.log_every == 0 or step == num_steps:
                    values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
                    now = time.monotonic()
                    rate = config.batch_size * (step - interval_step) / (now - interval_started)
                    interval_step, interval_started = step, now
                    writer.write(
                        step=step,
                        epoch=step / steps_per_epoch,
                        split="train",
                        **values,
                        learning_rate=float(schedule(step - 1)),
                        images_per_second=rate,
                    )
                    bar.update(step, f"loss {values['loss']:.3f}, {rate:.0f} images/s")
                else:
                    bar.update(step)
                if config.eval_every_epochs and step % eval_every == 0 and step != num_steps:
                    evaluate_now(step)
                if step % config.checkpoint_every == 0 and step != num_steps:
                    checkpoints.save(step, state, position())

        # --- Result -----------------------------------------------------------------------------
        result = evaluate_now(num_steps)
        tests = [r["top1"] for r in read_metrics(workdir) if r["split"] == "test"]
        description = {
            "model": {**config.model.to_dict(), "num_classes": len(dataset.class_names)},
            "channels": channels,
            "class_names": list(dataset.class_names),
            "preprocessing": {name: data[name] for name in pipeline.PREPROCESSING},
            "trained_on": {"data": data.to_dict(), "steps": num_steps, "init": config.init},
            "versions": versions(),
        }
        checkpoint.save_model(workdir / "model", jax.device_get(state.variables), description)
        result |= {
            "best_top1": max(tests),
            "steps": num_steps,
            "seconds": position()["seconds"],
            "train_step_compilations": train_step._cache_size(),
        }
        checkpoints.save(num_steps, state, position())
    workdir_lib.write_json(workdir / "result.json", result)
    return result
