"""The paper's protocol over a grid: variants, rules of conversion and other axes, for some seeds.

Per seed: pretrain a multi-head ViT, or take one that is given; then per cell (grid.py): convert it
(evaluated at once, without any training), uptrain it, for one length or several, fine-tune it on
the data of that stage, evaluate; and probe frozen features after any of these (stages.py).

    WORKDIR/config.json
    WORKDIR/seed42/pretrained/              a training run (train.train_and_evaluate)
    WORKDIR/pretrained/                     instead, where the model is given
    WORKDIR/seed42/kdgqa@svd/converted/     a model directory and record.json
    WORKDIR/seed42/kdgqa@svd/uptrained/     or, by length, uptrained_200/ ...
    WORKDIR/seed42/kdgqa@svd/finetuned/
    WORKDIR/seed42/kdgqa@svd/converted_knn/ of a probe: record.json alone
    WORKDIR/report/                         results.json, timings.json, results.md and plots

Every finished stage leaves record.json; a study that was stopped resumes from what is there.
"""

import dataclasses
import functools
import os
from typing import Any, TypeAlias

import jax
import ml_collections

from kdgqa_jax import config as config_lib
from kdgqa_jax import grid, jobs, paths, report, study_checks, train
from kdgqa_jax import stages as stages_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.data import identity
from kdgqa_jax.errors import UserError
from kdgqa_jax.grid import Cell, Stage

Config: TypeAlias = ml_collections.ConfigDict
Record = dict[str, Any]

MAY_GROW = ("variants", "grid", "seeds", "probes", "probed", "rates")
"""Fields that may change when a study resumes: every stage of every cell has a folder of its own,
which has the settings of the axes in its name."""

_BEGUN = {
    "pretrain": (("pretrained*", "seed*/pretrained*"), ("pretrain",)),
    "uptrain": (
        ("seed*/*/converted",),
        ("uptrain", "uptrain_steps", "num_kv_heads", "pooling", "calibration_images"),
    ),
    "finetune": (("seed*/*/finetuned",), ("finetune",)),
}
"""Sections of a study: their folders, and the fields that are settled once there is one."""


def run_study(config: Config, workdir: str | os.PathLike, num_jobs: int = 1) -> list[Record]:
    """Run the protocol, write `workdir/report/` and return the records of results.json.

    Args:
      config: the fields of `config.study_config()`.
      workdir: of the study; one that holds a part of it is completed.
      num_jobs: stages that are run at once, in processes of their own, with the same figures; for
        CPUs.

    Raises:
      UserError: a bad config of any stage, data or workdir; all that can be known before the first
        stage begins is checked then. Cells that failed, once the others have ended.
    """
    if num_jobs > 1 and jax.default_backend() != "cpu":
        raise UserError(
            f"--jobs={num_jobs} shares the cores of a CPU, but this computes on"
            f" {jax.default_backend()}, which one process has for itself; leave --jobs out"
        )
    study_checks.check_fields(config)
    cells, datasets = grid.cells(config), study_checks.Datasets()
    described = study_checks.check(config, cells, datasets)
    begun = begun_in(workdir)
    defaults = config_lib.study_config().to_dict()
    with workdir_lib.held(workdir, config.to_dict(), _may_change(begun), defaults) as workdir:
        data = {what: identity.describe(found) for what, found in described.items()}
        renew = [what for what in data if what.split()[0] not in begun]
        identity.check(workdir, data, renew=renew)
        planned = plan(config, cells, datasets)
        tasks = {
            stage.folder: jobs.Task(stage.folder, stage, stage.before)
            for stages in planned.values()
            for stage in stages
        }
        call = functools.partial(stages_lib.finish, config, workdir)
        failures = jobs.run(list(tasks.values()), call, num_jobs)
        records = _records(workdir, planned, failures)
        _write(workdir, planned, records)
    _raise_failures(records, workdir)
    return records


def plan(
    config: Config, cells: list[Cell], datasets: study_checks.Datasets
) -> dict[Cell, list[Stage]]:
    """The stages of every cell, in order."""
    known: dict[tuple, tuple[Config, int]] = {}
    for cell in cells:
        if cell.settings not in known:  # of all seeds and several entries
            applied = cell.applied(config)
            known[cell.settings] = applied, datasets.sizes(applied.uptrain.data)[0]
    return {
        cell: grid.stages(known[cell.settings][0], cell, known[cell.settings][1]) for cell in cells
    }


def begun_in(workdir: str | os.PathLike) -> set[str]:
    """The sections of which there is a folder."""
    place = paths.place(workdir, "workdir")
    return {
        section
        for section, (folders, _) in _BEGUN.items()
        if any(found for folder in folders for found in place.glob(folder))
    }


def _may_change(begun: set[str]) -> list[str]:
    """Fields that may differ from those of before: of sections that have not begun, any."""
    free = [f"{section}.{field}" for section in _BEGUN for field in train.MAY_CHANGE]
    for section, (_, fields) in _BEGUN.items():
        free += () if section in begun else fields
    return [*MAY_GROW, *free]


# --- results --------------------------------------------------------------------------------------


def _records(
    workdir: paths.Path, planned: dict[Cell, list[Stage]], failures: dict[str, str]
) -> list[Record]:
    """Those of results.json, by the order of the grid: pretrained models before their cells.

    A stage that cells share has a record in each of them. Of a cell that failed, the first stage
    that did so has a record with the reason in "failed", and no figures.
    """
    records, seen, failed = [], set(), set()
    for cell, stages in planned.items():
        for stage in stages:
            of_base = stage.kind == "pretrained"
            owner = stage.cell if of_base else cell
            owner = dataclasses.replace(owner, seed=cell.seed)  # a given model is that of all seeds
            about = {
                "entry": owner.name,
                "variant": owner.entry.variant,
                "rule": owner.entry.rule,
                "seed": owner.seed,
            }
            where = {"settings": dict(owner.settings), "folder": stage.folder}
            if of_base and (stage.folder, cell.seed) in seen:
                continue
            seen.add((stage.folder, cell.seed))
            if stage.folder not in failures:
                found = stages_lib.finished(workdir, stage).records
                records += [{**about, **record, **about, **where} for record in found]
            elif owner not in failed and (stage.probes or not of_base):  # cells follow their base
                failed.add(owner)
                records.append({**about, "stage": stage.name, "failed": failures[stage.folder]})
    return records


def _write(workdir: paths.Path, planned: dict[Cell, list[Stage]], records: list[Record]) -> None:
    """results.json, what failed, how long stages took, and the report of all cells that ended."""
    folder = workdir / "report"
    failed = [record for record in records if "failed" in record]
    workdir_lib.write_json(folder / "results.json", records)
    stages = {stage.folder: stage for stages in planned.values() for stage in stages}
    ended = {name: stages_lib.finished(workdir, stage) for name, stage in stages.items()}
    seconds = {name: found.seconds for name, found in ended.items() if found}
    workdir_lib.write_json(folder / "timings.json", seconds)
    if failed:
        lines = [_sentence(record) for record in failed]
        with workdir_lib.written_file(folder / "failed.md") as path:
            path.write_text("\n".join(["# Cells that failed", "", *lines, ""]), "utf-8")
    else:
        (folder / "failed.md").unlink(missing_ok=True)
    if len(failed) < len(planned):
        report.build(workdir)


def _sentence(record: Record) -> str:
    return f"- {record['entry']}, seed {record['seed']}, {record['stage']}: {record['failed']}"


def _raise_failures(records: list[Record], workdir: paths.Path) -> None:
    failed = [record for record in records if "failed" in record]
    if failed:
        cells = len({(r["entry"], r["seed"]) for r in records if r["stage"] != "pretrained"})
        raise UserError(
            f"{len(failed)} of {cells} cells failed, the first one {_sentence(failed[0])[2:]};"
            f" {workdir / 'report' / 'failed.md'} has them all, and the same command runs them"
            " again"
        )
