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

Every finished stage leaves record.json; a study that was stopped resumes from what is there.
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

from kdgqa_jax import (
    checkpoint,
    convert,
    layers,
    logs,
    optim,
    options,
    paths,
    report,
    sharding,
    starting,
    train,
    vit,
)
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.console import say
from kdgqa_jax.data import augment, identity, pipeline, sources
from kdgqa_jax.entry import Entry, parse_entries
from kdgqa_jax.errors import UserError, check_seed
from kdgqa_jax.evaluate import evaluate, make_eval_step
from kdgqa_jax.version import versions

Config = ml_collections.ConfigDict
Record = dict[str, Any]


MAY_GROW = ("variants", "seeds")
"""Fields that may change when a study resumes: every seed and entry has a folder of its own."""

_STAGES = {
    "pretrain": ("seed*/pretrained", ("pretrain",)),
    "uptrain": (
        "seed*/*/converted",
        ("uptrain", "uptrain_steps", "num_kv_heads", "pooling", "calibration_images"),
    ),
    "finetune": ("seed*/*/finetuned", ("finetune",)),
}
"""Sections of a study: their folders, and the fields that are settled once there is one."""


def run_study(config: Config, workdir: str | os.PathLike) -> list[Record]:
    """Run the protocol, write `workdir/report/` and return the records of results.json.

    Args:
      config: the fields of `config.study_config()`.
      workdir: of the study; one that holds a part of it is completed.

    Raises:
      UserError: a bad config of any stage, data or workdir; all that can be known before the first
        stage begins is checked then.
    """
    datasets = _check(config)
    data = {f"{stage} data": identity.describe(d) for stage, d in datasets.items()}
    begun = _begun(workdir)
    defaults = config_lib.study_config().to_dict()
    with workdir_lib.held(workdir, config.to_dict(), _may_change(begun), defaults) as workdir:
        identity.check(workdir, data, renew=[f"{stage} data" for stage in {*_STAGES} - begun])
        records = []
        for seed in range(config.seed, config.seed + config.seeds):
            records += _run_seed(config, workdir, seed)
        report.write(records, _histories(config, workdir), workdir / "report")
    return records


def _begun(workdir: str | os.PathLike) -> set[str]:
    """The stages of which there is a folder."""
    place = paths.local(workdir, "workdir")
    return {stage for stage, (folders, _) in _STAGES.items() if any(place.glob(folders))}


def _may_change(begun: set[str]) -> list[str]:
    """Fields that may differ from those of before: of stages that have not begun, any."""
    free = [f"{stage}.{field}" for stage in _STAGES for field in train.MAY_CHANGE]
    for stage, (_, fields) in _STAGES.items():
        free += () if stage in begun else fields
    return [*MAY_GROW, *free]


# --- Checks before the first stage --------------------------------------------------------------

_KEPT = ("name", "image_size", "scan_layers", "param_dtype")
"""Fields of the pretrained model, besides its architecture, that conversion and uptraining leave as
they are."""


def _check(study: Config) -> dict[str, sources.Dataset]:
    """The data of each stage. Raises UserError for what would be found out hours later."""
    if "variants" not in study:
        raise UserError("this config is one of a single run: kdgqa train --config ...")
    config_lib.check_fields(study, config_lib.study_config())
    if study.seeds < 1 or not study.variants:
        raise UserError(f"seeds={study.seeds} and variants={study.variants} must not be empty")
    for seed in (study.seed, study.seed + study.seeds - 1):
        check_seed(seed)
    if study.calibration_images < 1:
        raise UserError(f"calibration_images={study.calibration_images} must be at least 1")
    entries = parse_entries(study.variants, study.pooling)
    variants = dict.fromkeys(("mha", *(entry.variant for entry in entries)))
    datasets = {}
    for name in _STAGES:
        if name != "finetune" or study.finetune.epochs:
            try:
                datasets[name] = _check_stage(study, name, tuple(variants))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    kinds = [
        f"{len(datasets[name].class_names)} classes of images with"
        f" {datasets[name].image_shape[-1]} channels"
        for name in ("pretrain", "uptrain")
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"pretrain.data has {kinds[0]}, uptrain.data has {kinds[1]}; uptraining continues with"
            " the model of pretraining, so give it data of the same kind"
        )
    kept = (*_KEPT, *options.names(vit.known_options(), options.ARCHITECTURE))
    different = [f for f in kept if study.pretrain.model[f] != study.uptrain.model[f]]
    if different:
        raise UserError(
            f"pretrain.model and uptrain.model differ in {', '.join(different)}; uptraining"
            " continues with the pretrained model, so set them alike"
        )
    if study.finetune.epochs:
        uptrained = {**study.uptrain.model.to_dict(), "attention": "mha", "num_kv_heads": None}
        finetune = _stage_config(study, study.finetune, "mha", study.seed)
        starting.check_start(finetune, "uptrain.model", uptrained)
    return datasets


def _check_stage(study: Config, name: str, variants: tuple[str, ...]) -> sources.Dataset:
    """The data of a stage. Raises UserError for one that cannot be run."""
    stage = _stage_config(study, study[name], "mha", study.seed)
    stage.epochs = stage.epochs or 1.0  # 0 leaves it out; the data of uptraining are used even so
    train.check(stage)
    data = stage.data
    dataset = sources.load(data.name, data.data_dir, data.shift)
    num_classes, channels = len(dataset.class_names), dataset.image_shape[-1]
    lengths = _uptrain_stages(study, len(dataset.train)) if name == "uptrain" else []
    for epochs in (stage.epochs, *(epochs for _, epochs in lengths)):
        stage.epochs = epochs
        train.count_steps(stage, len(dataset.train))
    for variant in variants:
        model = starting.build_model(_stage_config(study, stage, variant, study.seed), num_classes)
    prepared = pipeline.prepare(dataset, model.image_shape, data)
    train.check_batches(stage, (*prepared.train.shape, channels))
    if data.on_device:
        pipeline.check_on_device(prepared.train)
    if stage.optim.freeze:
        shapes = jax.eval_shape(lambda: vit.init_variables(model, jax.random.key(0), channels))
        optim.trainable(stage.optim, shapes["params"])
    return dataset


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
    multi_head = VARIANTS[variant].multi_head
    config.model.num_kv_heads = None if multi_head else study.num_kv_heads
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
        "num_heads": model.attention.num_heads,
        "num_kv_heads": model.attention.num_kv_heads,
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
    data, mesh = config.data, sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
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
        "norm_stats": vit.init_norm_stats(model),
    }
    description["model"] = {**config.model.to_dict(), "num_classes": model.num_classes}
    description["converted"] = {
        "from": config.init,
        "rule": entry.rule,
        "notes": grouped.notes + grouped.warnings,
        "energy_kept": grouped.energy_kept,
    }
    checkpoint.save_model(place / "model", variables, description)

    eval_step = make_eval_step(model, *pipeline.statistics(data), mesh)
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
