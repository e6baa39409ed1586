"""What a study would do: its cells, the stages that they share, and about how long it takes."""

import os
from collections import Counter
from typing import Any, TypeAlias

import ml_collections

from kdgqa_jax import grid, paths, study_checks
from kdgqa_jax import stages as stages_lib
from kdgqa_jax.console import say, table
from kdgqa_jax.grid import Cell, Stage
from kdgqa_jax.study import plan

Config: TypeAlias = ml_collections.ConfigDict


def show(config: Config, workdir: str | os.PathLike | None = None) -> float | None:
    """Print the cells of a study and an estimate of its time; nothing is written.

    Data sets that are not here are counted by the table of `data.sources`.

    Args:
      config: the fields of `config.study_config()`.
      workdir: of the study, whose finished stages are left out, and are timed for the others; None:
        nothing is finished.

    Returns:
      The estimate in seconds, of what is left; None where no rates or timings are known.

    Raises:
      UserError: a bad grid, or data that cannot be counted.
    """
    study_checks.check_fields(config)
    datasets = study_checks.Datasets(declared=True)
    planned = plan(config, grid.cells(config), datasets)
    place = paths.place(workdir, "workdir") if workdir else None
    stages = {s.folder: s for stages in planned.values() for s in stages}
    records = {f: place and stages_lib.finished(place, s) for f, s in stages.items()}
    _show_cells(planned, records)
    _show_stages(planned, stages, records)
    return _show_estimate(config, stages, records, datasets)


def _show_cells(planned: dict[Cell, list[Stage]], records: dict[str, Any]) -> None:
    """A row for each cell, all of its seeds together."""
    names = list(dict.fromkeys(stage.name for stages in planned.values() for stage in stages))
    rows: dict[str, dict[str, list[bool]]] = {}
    for cell, stages in planned.items():
        row = rows.setdefault(cell.name, {name: [] for name in names})
        for stage in stages:
            row[stage.name].append(records[stage.folder] is not None)
    shown = [
        [name, *(f"{sum(done)} of {len(done)}" if done else "" for done in row.values())]
        for name, row in rows.items()
    ]
    table(("cell", *names), shown, "stages that are finished, of all seeds", numbers=True)


def _show_stages(
    planned: dict[Cell, list[Stage]], stages: dict[str, Stage], records: dict[str, Any]
) -> None:
    uses = Counter(stage.folder for cell in planned.values() for stage in cell)
    by_name = Counter(stage.name for stage in stages.values())
    shared = Counter(stages[folder].name for folder, count in uses.items() if count > 1)
    what = [
        f"{count} {name}{f' ({shared[name]} shared by several cells)' if shared[name] else ''}"
        for name, count in by_name.items()
    ]
    done = sum(record is not None for record in records.values())
    say(f"{len(planned)} cells, {len(stages)} stages: {', '.join(what)}; {done} are finished")


def _show_estimate(
    config: Config,
    stages: dict[str, Stage],
    records: dict[str, Any],
    datasets: study_checks.Datasets,
) -> float | None:
    known: dict[tuple, tuple[float, float]] = {}
    work = {}
    for folder, stage in stages.items():
        same = (stage.name, stage.cell.settings, stage.cell.entry.calibrated)
        if same not in known:  # of all seeds and several entries
            known[same] = _work(config, stage, datasets)
        work[folder] = known[same]
    left = [folder for folder, record in records.items() if record is None]
    measured: dict[str, list[float]] = {}
    for folder, record in records.items():
        if record is not None:
            one = record.seconds / max(sum(work[folder]), 1)
            measured.setdefault(_kind(stages[folder]), []).append(one)
    total, unknown = 0.0, set()
    for folder in left:
        kind, (trained, evaluated) = _kind(stages[folder]), work[folder]
        rates = config.rates
        if kind in measured:
            total += (trained + evaluated) * sum(measured[kind]) / len(measured[kind])
        elif (rates.train or not trained) and rates.evaluate:
            total += rates.overhead + evaluated / rates.evaluate
            total += trained / rates.train if trained else 0.0
        else:
            unknown.add(kind)
    if unknown:
        say(
            f"no estimate: it is not known how long {' and '.join(sorted(unknown))} stages take;"
            " give --config.rates.train and --config.rates.evaluate in images/s, or run some"
        )
        return None
    by = "measured seconds" if measured else "declared rates"
    if measured and set(map(_kind, (stages[f] for f in left))) - set(measured):
        by = "measured seconds and declared rates"
    say(f"estimate, by {by}: {_duration(total)} are left, one stage at a time")
    return total


def _kind(stage: Stage) -> str:
    return "probe" if stage.probes else stage.kind


def _work(config: Config, stage: Stage, datasets: study_checks.Datasets) -> tuple[float, float]:
    """(images to train on, images to evaluate or to extract features of) of a stage."""
    settings = stages_lib.config_of(config, stage)
    train_images, test_images = datasets.sizes(settings.data)
    if stage.probes:
        return 0.0, train_images + test_images
    if stage.kind == "converted":
        calibrated = stage.cell.entry.calibrated
        images = stage.cell.applied(config).calibration_images if calibrated else 0
        return 0.0, test_images + images
    evaluations = 1
    if settings.eval_every_epochs:
        evaluations = max(round(settings.epochs / settings.eval_every_epochs), 1)
    return settings.epochs * train_images, evaluations * test_images


def _duration(seconds: float) -> str:
    """ "3 h 20 min"; of less than an hour minutes, of less than a minute seconds."""
    minutes = round(seconds / 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
