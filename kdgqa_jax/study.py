"""The paper's protocol over variants, rules of conversion and seeds.

Per seed: pretrain a multi-head ViT; then per entry (entry.py): convert it (evaluated at once,
without any training), uptrain it on the pretraining data, for one length or several, and fine-tune
it on the shifted data, evaluate.

    WORKDIR/config.json
    WORKDIR/seed42/pretrained/              a training run (train.train_and_evaluate)
    WORKDIR/seed42/kdgqa@svd/converted/     a model directory and record.json
    WORKDIR/seed42/kdgqa@svd/uptrained/     or, by length, uptrained_200/ ...
    WORKDIR/seed42/kdgqa@svd/finetuned/
    WORKDIR/report/                         results.json, results.md and plots

Every finished stage leaves record.json; a study that was stopped goes on from what is there.
"""

import os
import pathlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from kdgqa_jax import checkpoint, convert, layers, logs, report, sharding, starting, train, vit
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.console import say
from kdgqa_jax.data import augment, identity, pipeline, sources
from kdgqa_jax.entry import Entry, parse_entries
from kdgqa_jax.errors import UserError, check_seed
from kdgqa_jax.evaluate import evaluate, make_eval_step
from kdgqa_jax.version import versions

Config = ml_collections.ConfigDict
Record = dict[str, Any]


def run_study(config: Config, workdir: str | os.PathLike) -> list[Record]:
    """Run the protocol, write `workdir/report/` and return the records of results.json.

    Args:
      config: the fields of `config.study_config()`.
      workdir: of the study; one that holds a part of it is completed.

    Raises:
      UserError: a bad config, data or workdir.
    """
    _check(config)
    workdir = workdir_lib.claim(workdir, config.to_dict())
    identity.check(workdir, _data(config))
    records = []
    for seed in range(config.seed, config.seed + config.seeds):
        records += _run_seed(config, workdir, seed)
    report.write(records, _histories(config, workdir), workdir / "report")
    return records


def _check(config: Config) -> None:
    """Raise UserError for what would otherwise be found out hours later."""
    config_lib.check_fields(config, config_lib.study_config())
    if config.seeds < 1 or not config.variants:
        raise UserError(f"seeds={config.seeds} and variants={config.variants} must not be empty")
    for seed in (config.seed, config.seed + config.seeds - 1):
        check_seed(seed)
    if config.calibration_images < 1:
        raise UserError(f"calibration_images={config.calibration_images} must be at least 1")
    entries = parse_entries(config.variants, config.pooling)
    _uptrain_stages(config, images=1)
    for stage in (config.pretrain, config.uptrain, config.finetune):
        for variant in ("mha", *(entry.variant for entry in entries)):
            starting.build_model(_stage_config(config, stage, variant, config.seed), num_classes=2)


def _data(config: Config) -> dict[str, identity.Description]:
    """What tells the data of each stage from others."""
    stages = {name: config[name].data for name in ("pretrain", "uptrain", "finetune")}
    return {
        f"{name} data": identity.describe(sources.load(data.name, data.data_dir, data.shift))
        for name, data in stages.items()
    }


def _uptrain_stages(study: Config, images: int) -> list[tuple[str, float]]:
    """(stage, epochs) of every length of uptraining, for a training split of so many images."""
    if not study.uptrain_steps:
        return [("uptrained", study.uptrain.epochs)] if study.uptrain.epochs else []
    try:
        steps = [int(n) for n in study.uptrain_steps]
    except ValueError:
        steps = [0]
    if min(steps) < 1 or len(set(steps)) < len(steps):
        raise UserError(
            f"uptrain_steps={study.uptrain_steps} must be different numbers of steps, at least 1"
        )
    return [(f"uptrained {n}", n * study.uptrain.batch_size / images) for n in steps]


def _stage_config(
    study: Config, stage: Config, variant: str, seed: int, init: pathlib.Path | None = None
) -> Config:
    """The training config of one stage for one variant and seed."""
    config = stage.copy_and_resolve_references()
    config.model.attention = variant
    config.model.num_kv_heads = None if variant == "mha" else study.num_kv_heads
    config.seed = seed
    config.init = str(init) if init else ""
    return config


def _run_seed(study: Config, workdir: pathlib.Path, seed: int) -> list[Record]:
    folder = workdir / f"seed{seed}"

    def trained(place: pathlib.Path, entry: Entry, stage: str, config: Config) -> Record:
        def run() -> dict[str, Any]:
            return train.train_and_evaluate(config, place, f"seed {seed} {entry.name} {stage}")

        return _finished(place, entry, stage, config, run)

    base = folder / "pretrained"
    config = _stage_config(study, study.pretrain, "mha", seed)
    records = [trained(base, Entry("mha", "pretrained", "mha"), "pretrained", config)]
    data = study.uptrain.data
    images = len(sources.load(data.name, data.data_dir, data.shift).train)
    for entry in parse_entries(study.variants, study.pooling):
        place = folder / entry.folder
        config = _stage_config(study, study.uptrain, entry.variant, seed, base / "model")
        before = place / "converted"
        convert_this = partial(_convert, study, entry, config, before)
        records.append(_finished(before, entry, "converted", config, convert_this))
        init = before / "model"
        for stage, epochs in _uptrain_stages(study, images):
            config = _stage_config(study, study.uptrain, entry.variant, seed, init)
            config.epochs = epochs
            before = place / stage.replace(" ", "_")
            records.append(trained(before, entry, stage, config))
        if study.finetune.epochs:
            init = before / "model"
            config = _stage_config(study, study.finetune, entry.variant, seed, init)
            records.append(trained(place / "finetuned", entry, "finetuned", config))
    return records


def _finished(
    place: pathlib.Path,
    entry: Entry,
    stage: str,
    config: Config,
    run: Callable[[], dict[str, Any]],
) -> Record:
    """The record of a stage in `place`; `run` makes its model and figures, unless it is there."""
    path = place / "record.json"
    if path.exists():
        return workdir_lib.read_json(path)
    result = run()
    record = _make_record(place, entry, stage, config, result)
    workdir_lib.write_json(path, record)
    say(
        f"seed {config.seed} {entry.name} {stage}: top-1 {record['top1']:.2f} %,"
        f" loss {record['loss']:.3f}, {record['seconds']:.1f} s"
    )
    return record


def _make_record(
    place: pathlib.Path, entry: Entry, stage: str, config: Config, result: dict[str, Any]
) -> Record:
    """One record of results.json, from the model directory in `place` and its figures."""
    model, variables, _ = checkpoint.load_model(place / "model")
    num_params, num_kv_params = layers.count_parameters(variables["params"])
    device = jax.devices()[0]
    settings = config.to_dict()
    if config.init:  # the same wherever the study lies
        settings["init"] = os.path.relpath(config.init, place)
    return {
        "entry": entry.name,
        "variant": entry.variant,
        "rule": entry.rule,
        "seed": config.seed,
        "stage": stage,
        **{name: result[name] for name in ("top1", "top5", "loss")},
        "test_images": result["count"],
        "num_params": num_params,
        "num_kv_params": num_kv_params,
        "num_heads": model.attention["num_heads"],
        "num_kv_heads": model.attention["num_kv_heads"],
        "steps": result["steps"],
        "seconds": round(result["seconds"], 3),
        "allocation": result["allocation"],
        "idle_kv_heads": int(np.sum(np.asarray(result["allocation"]) == 0)),
        "config": settings,
        "versions": versions(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def _convert(study: Config, entry: Entry, config: Config, place: pathlib.Path) -> dict[str, Any]:
    """Convert the model `config.init` into `config.model`; save and evaluate it as it is."""
    started = time.monotonic()
    before, variables, description = checkpoint.load_model(config.init)
    model = starting.build_model(config, len(description["class_names"]))
    data, mesh = config.data, sharding.make_mesh()
    dataset = sources.load(data.name, data.data_dir, data.shift)
    dataset = pipeline.prepare(dataset, model.image_shape, data)
    images = None
    if entry.calibrated:
        count = min(study.calibration_images, len(dataset.train))
        pixels = np.stack([dataset.train[i]["image"] for i in range(count)])
        images = augment.to_model_input(pixels, model.image_shape, *pipeline.statistics(data))
    grouped = convert.group_heads(
        before,
        variables,
        model,
        entry.pooling,
        seed=config.seed,
        images=images,
        merge_by_data=not entry.free,
        refit=entry.refit,
    )
    variables = {
        "params": grouped.params,
        "norm_stats": vit.init_norm_stats(model, description["channels"]),
    }
    description["model"] = {**config.model.to_dict(), "num_classes": model.num_classes}
    description["converted"] = {
        "from": config.init,
        "rule": entry.rule,
        "notes": grouped.notes + grouped.warnings,
        "energy_kept": grouped.energy_kept,
    }
    checkpoint.save_model(place / "model", variables, description)

    eval_step = make_eval_step(model, *pipeline.statistics(data))
    result = evaluate(eval_step, variables, dataset.test, config.eval_batch_size, mesh)
    return {**result, "steps": 0, "seconds": time.monotonic() - started}


def _histories(config: Config, workdir: pathlib.Path) -> dict[str, report.History]:
    """Per entry, of the first seed: what training has logged, by stage."""
    folder = workdir / f"seed{config.seed}"
    histories = {}
    uptrained = [stage for stage, _ in _uptrain_stages(config, images=1)]
    for entry in parse_entries(config.variants, config.pooling):
        stages = {
            stage: logs.read_metrics(folder / entry.folder / stage.replace(" ", "_"))
            for stage in (*uptrained[-1:], "finetuned")
        }
        histories[entry.name] = {
            stage: [r for r in records if r["split"] == "train"]
            for stage, records in stages.items()
            if records
        }
    return histories
