"""The paper's protocol over variants and seeds.

Per seed: pretrain a multi-head ViT; then per variant: convert it (evaluated at once, without any
training), uptrain it on the pretraining data, fine-tune it on the shifted data, evaluate.

    WORKDIR/config.json
    WORKDIR/seed42/pretrained/            a training run (train.train_and_evaluate)
    WORKDIR/seed42/kdgqa/converted/       a model directory and record.json
    WORKDIR/seed42/kdgqa/uptrained/ finetuned/
    WORKDIR/report/                       results.json, results.md and plots

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

from kdgqa_jax import checkpoint, convert, layers, report, sharding, train, vit
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import variant_name
from kdgqa_jax.console import say
from kdgqa_jax.data import pipeline, sources
from kdgqa_jax.errors import UserError, unknown
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
    records = []
    for seed in range(config.seed, config.seed + config.seeds):
        records += _run_seed(config, workdir, seed)
    report.write(records, _histories(config, workdir), workdir / "report")
    return records


def _check(config: Config) -> None:
    """Raise UserError for what would otherwise be found out hours later."""
    config_lib.check_fields(config, config_lib.study_config())
    if config.pooling not in convert.POOLING:
        raise unknown("pooling", config.pooling, convert.POOLING)
    if config.seeds < 1 or not config.variants:
        raise UserError(f"seeds={config.seeds} and variants={config.variants} must not be empty")
    names = [variant_name(variant) for variant in config.variants]
    if len(set(names)) < len(names):
        raise UserError(f"variants={config.variants} names one of them twice")
    for stage in (config.pretrain, config.uptrain, config.finetune):
        for variant in ("mha", *config.variants):
            train.build_model(_stage_config(config, stage, variant, config.seed), num_classes=2)


def _stage_config(
    study: Config, stage: Config, variant: str, seed: int, init: pathlib.Path | None = None
) -> Config:
    """The training config of one stage for one variant and seed."""
    config = stage.copy_and_resolve_references()
    config.model.attention = variant
    config.model.num_kv_heads = None if variant_name(variant) == "mha" else study.num_kv_heads
    config.seed = seed
    config.init = str(init) if init else ""
    return config


def _run_seed(study: Config, workdir: pathlib.Path, seed: int) -> list[Record]:
    folder = workdir / f"seed{seed}"

    def trained(place: pathlib.Path, variant: str, stage: str, config: Config) -> Record:
        def run() -> dict[str, Any]:
            return train.train_and_evaluate(config, place, f"seed {seed} {variant} {stage}")

        return _finished(place, variant, stage, config, run)

    base = folder / "pretrained"
    config = _stage_config(study, study.pretrain, "mha", seed)
    records = [trained(base, "mha", "pretrained", config)]
    for variant in study.variants:
        place = folder / variant
        config = _stage_config(study, study.uptrain, variant, seed, base / "model")
        convert_this = partial(_convert, study, config, place / "converted")
        records.append(_finished(place / "converted", variant, "converted", config, convert_this))
        before = place / "converted"
        for stage, settings in (("uptrained", study.uptrain), ("finetuned", study.finetune)):
            config = _stage_config(study, settings, variant, seed, before / "model")
            records.append(trained(place / stage, variant, stage, config))
            before = place / stage
    return records


def _finished(
    place: pathlib.Path,
    variant: str,
    stage: str,
    config: Config,
    run: Callable[[], dict[str, Any]],
) -> Record:
    """The record of a stage in `place`; `run` makes its model and figures, unless it is there."""
    path = place / "record.json"
    if path.exists():
        return workdir_lib.read_json(path)
    result = run()
    record = _make_record(place, variant, stage, config, result)
    workdir_lib.write_json(path, record)
    say(
        f"seed {config.seed} {variant} {stage}: top-1 {record['top1']:.2f} %,"
        f" loss {record['loss']:.3f}, {record['seconds']:.1f} s"
    )
    return record


def _make_record(
    place: pathlib.Path, variant: str, stage: str, config: Config, result: dict[str, Any]
) -> Record:
    """One record of results.json, from the model directory in `place` and its figures."""
    model, variables, _ = checkpoint.load_model(place / "model")
    num_params, num_kv_params = layers.count_parameters(variables["params"])
    device = jax.devices()[0]
    settings = config.to_dict()
    if config.init:  # the same wherever the study lies
        settings["init"] = os.path.relpath(config.init, place)
    return {
        "variant": variant,
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


def _convert(study: Config, config: Config, place: pathlib.Path) -> dict[str, Any]:
    """Convert the model `config.init` into `config.model`; save and evaluate it as it is."""
    started = time.monotonic()
    _, variables, description = checkpoint.load_model(config.init)
    model = train.build_model(config, len(description["class_names"]))
    kv_heads = model.attention["num_kv_heads"]
    params = convert.to_grouped(variables["params"], kv_heads, study.pooling, config.seed)
    variables = {
        "params": params,
        "norm_stats": vit.init_norm_stats(model, description["channels"]),
    }
    description["model"] = {**config.model.to_dict(), "num_classes": model.num_classes}
    description["converted"] = {"from": config.init, "pooling": study.pooling}
    checkpoint.save_model(place / "model", variables, description)

    data, mesh = config.data, sharding.make_mesh()
    dataset = sources.load(data.name, data.data_dir, data.shift)
    dataset = pipeline.prepare(dataset, model.image_shape, data)
    eval_step = make_eval_step(model, *pipeline.statistics(data))
    result = evaluate(eval_step, variables, dataset.test, config.eval_batch_size, mesh)
    return {**result, "steps": 0, "seconds": time.monotonic() - started}


def _histories(config: Config, workdir: pathlib.Path) -> dict[str, report.History]:
    """Per variant, of the first seed: what training has logged, by stage."""
    folder = workdir / f"seed{config.seed}"
    histories = {}
    for variant in config.variants:
        stages = {stage: train.read_metrics(folder / variant / stage) for stage in report.TRAINED}
        histories[variant] = {
            stage: [r for r in records if r["split"] == "train"]
            for stage, records in stages.items()
        }
    return histories
