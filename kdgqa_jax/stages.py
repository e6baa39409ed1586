"""What the stages of a cell do: each leaves a model with its figures, or the figures of a probe.

A finished stage has record.json in its folder, with what results.json says of it and how long it
took; checkpoints of its training are gone. Whatever was stopped before that is resumed, or made
again.
"""

import os
import time
import traceback
from typing import Any, NamedTuple, TypeAlias

import jax
import ml_collections
import numpy as np

from kdgqa_jax import (
    checkpoint,
    convert,
    initial,
    options,
    paths,
    probes,
    sharding,
    storage,
    train,
    tree_utils,
    vit,
)
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.data import augment, pipeline, subsets
from kdgqa_jax.data.dataset import Dataset
from kdgqa_jax.errors import Preempted, UserError
from kdgqa_jax.evaluate import evaluate, make_eval_step
from kdgqa_jax.grid import SECTIONS, Stage
from kdgqa_jax.version import versions

Config: TypeAlias = ml_collections.ConfigDict
Record = dict[str, Any]

RECORD = "record.json"


def config_of(study: Config, stage: Stage, workdir: paths.Path | None = None) -> Config:
    """The training config of a stage.

    Args:
      study: the config, without the settings of the cell.
      stage: one of its stages.
      workdir: of the study; None: the model that it begins with is left out.
    """
    settings = stage.cell.applied(study)
    config = settings[SECTIONS[stage.kind]].copy_and_resolve_references()
    variant = stage.cell.entry.variant
    config.model.attention = variant
    config.model.num_kv_heads = None if VARIANTS[variant].multi_head else settings.num_kv_heads
    config.seed = stage.cell.seed
    if stage.kind != "pretrained":
        config.init = str(workdir / stage.before / "model") if workdir else ""
    if stage.epochs is not None:
        config.epochs = stage.epochs
    return config


def model_options(config: Config, before: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `vit.create` for a model that is converted by a config.

    Args:
      config: a training config.
      before: those of the model that there is, whose architecture stays.
    """
    known = vit.known_options()
    chosen = options.names(known, options.RULE, options.RUN, options.PROGRAM)
    chosen += ("attention", "num_kv_heads")
    widths = set(options.names(known, options.CONVERSION)) - {*chosen, "image_size"}
    chosen += tuple(sorted(name for name in widths if config.model[name] is not None))
    return {**before, **{name: config.model[name] for name in chosen}}


class Finished(NamedTuple):
    """What record.json holds: records of results.json, and how long they took in seconds."""

    records: list[Record]
    seconds: float


def finished(workdir: paths.Path, stage: Stage) -> Finished | None:
    """What a stage has found; None before it has ended."""
    path = workdir / stage.folder / RECORD
    if not path.exists():
        return None
    content = workdir_lib.read_json(path)
    seconds = content.pop("seconds")
    return Finished(content["probes"] if stage.probes else [content], seconds)


def finish(study: Config, workdir: paths.Path, stage: Stage) -> str:
    """Run a stage, unless it has ended before, and return a line about it ("" if it had).

    Raises:
      UserError: what its run, conversion or probe raises. Of another error the traceback is in
        error.txt of the stage's folder.
    """
    if finished(workdir, stage):
        return ""
    try:
        return _finish(study, workdir, stage)
    except (UserError, Preempted):
        raise
    except Exception:
        with workdir_lib.written_file(workdir / stage.folder / "error.txt") as path:
            path.write_text(traceback.format_exc(), "utf-8")
        raise


def _finish(study: Config, workdir: paths.Path, stage: Stage) -> str:
    place, config = workdir / stage.folder, config_of(study, stage, workdir)
    title = f"seed {stage.cell.seed} {stage.cell.name} {stage.name}"
    started = time.monotonic()
    if stage.probes:
        content = {"probes": _probe(config, workdir, stage)}
    else:
        content = _record(place, stage, config, _model(study, config, stage, place, title))
    content["seconds"] = round(content.get("seconds", time.monotonic() - started), 3)
    workdir_lib.write_json(place / RECORD, content)
    storage.remove(place / "checkpoints")  # several times as large as the model
    records, seconds = finished(workdir, stage)
    if "untrained_head" in records[0]:
        return f"{title}: its class head is not trained yet, {seconds:.1f} s"
    top1 = ", ".join(f"{r['top1']:.2f} % ({r['stage']})" for r in records)
    return f"{title}: top-1 {top1}, {seconds:.1f} s"


def _model(
    study: Config, config: Config, stage: Stage, place: paths.Path, title: str
) -> dict[str, Any]:
    """Make the model of a stage of the protocol; its figures on the test split."""
    if stage.kind == "converted":
        return _convert(stage.cell.applied(study), config, stage, place)
    if config.epochs:
        return train.train_and_evaluate(config, place, title)
    return _take(config, place)


def _record(place: paths.Path, stage: Stage, config: Config, result: dict[str, Any]) -> Record:
    """From the model directory in `place` and its figures."""
    model, variables, _ = checkpoint.load_model(place / "model")
    num_params, num_kv_params = tree_utils.count_parameters(variables["params"])
    device = jax.devices()[0]
    settings = config.to_dict()
    if stage.before:  # the same wherever the study lies
        settings["init"] = os.path.relpath(config.init, place)
    return {
        "stage": stage.name,
        **{name: result[name] for name in ("top1", "top5", "loss")},
        "test_images": result["count"],
        "num_params": num_params,
        "num_kv_params": num_kv_params,
        "num_heads": model.attention.num_heads,
        "num_kv_heads": model.attention.num_kv_heads,
        "steps": result["steps"],
        **({"seconds": result["seconds"]} if "seconds" in result else {}),  # of the loop, in all
        "allocation": result["allocation"],
        "idle_kv_heads": int(np.sum(np.asarray(result["allocation"]) == 0)),
        "config": settings,
        "versions": versions(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        **({"untrained_head": True} if _is_new(variables["params"]["head"]) else {}),
    }


def _is_new(head: dict[str, Any]) -> bool:
    """A class head as it is initialised: its logits are the same for all images."""
    return not np.any(head["kernel"])


# --- stages without training ----------------------------------------------------------------------


def _take(config: Config, place: paths.Path) -> dict[str, Any]:
    """The given model `config.init` with a head for the data; save and evaluate it as it is."""
    dataset = subsets.load(config.data, config.seed)
    channels, class_names = dataset.image_shape[-1], list(dataset.class_names)
    initial_model = initial.load(config, len(class_names), channels)
    description = {
        "model": initial_model.model,
        "channels": channels,
        "class_names": class_names,
        "preprocessing": initial_model.preprocessing,
        "converted": {"from": config.init, "notes": list(initial_model.notes)},
        "versions": versions(),
    }
    checkpoint.save_model(place / "model", initial_model.variables, description)
    config.data.update(initial_model.preprocessing)
    return _evaluate(config, initial_model.build(), initial_model.variables, dataset)


def _convert(study: Config, config: Config, stage: Stage, place: paths.Path) -> dict[str, Any]:
    """Convert the model `config.init`; save and evaluate it as it is."""
    entry = stage.cell.entry
    before, variables, description = checkpoint.load_model(config.init)
    description["model"] = model_options(config, description["model"])
    model = vit.create(**description["model"])
    config.data.update(initial.follow_preprocessing(config.data, description["preprocessing"]))
    dataset = subsets.load(config.data, config.seed)
    images = None
    if entry.calibrated:
        whole = pipeline.prepare(dataset, model.image_shape, config.data).train
        count = min(study.calibration_images, len(whole))
        pixels = np.stack([whole[i]["image"] for i in range(count)])
        statistics = pipeline.statistics(config.data)
        images = augment.to_model_input(pixels, model.image_shape, *statistics)
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
    variables = {"params": grouped.params, "norm_stats": vit.init_norm_stats(model)}
    description["converted"] = {
        "from": config.init,
        "rule": entry.rule,
        "notes": grouped.notes + grouped.warnings,
        "energy_kept": grouped.energy_kept,
    }
    checkpoint.save_model(place / "model", variables, description)
    return _evaluate(config, model, variables, dataset)


def _evaluate(
    config: Config,
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    dataset: Dataset,
) -> dict[str, Any]:
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    test = pipeline.prepare(dataset, model.image_shape, config.data).test
    eval_step = make_eval_step(model, *pipeline.statistics(config.data), mesh)
    result = evaluate(eval_step, variables, test, config.eval_batch_size, mesh)
    return {**result, "steps": 0}


def _probe(config: Config, workdir: paths.Path, stage: Stage) -> list[Record]:
    """The record of the stage that is probed, with the figures of each probe."""
    probed = workdir_lib.read_json(workdir / stage.before / RECORD)
    probed.pop("untrained_head", None)  # probes read features
    del probed["seconds"]
    model, variables, description = checkpoint.load_model(workdir / stage.before / "model")
    data = config.data
    data.update(initial.follow_preprocessing(data, description["preprocessing"]))
    dataset = pipeline.prepare(subsets.load(data, config.seed), model.image_shape, data)
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    given = (pipeline.statistics(data), config.eval_batch_size, mesh)
    features = probes.features_of(model, variables, dataset, *given)
    records = []
    for name in stage.probes:
        result = probes.run(name, features, seed=config.seed)
        records.append(
            {
                **probed,
                "stage": f"{name} {probed['stage']}",
                **{field: result[field] for field in ("top1", "top5", "loss", "probe")},
                "test_images": result["count"],
                "steps": 0,
            }
        )
    return records
