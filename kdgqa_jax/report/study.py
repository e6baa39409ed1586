"""The report of a study: results.json, results.md, tables, plots, and report.html of it all."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax import comparisons, console, logs, paths, plots, workdir
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.comparisons import Comparison, mean_and_interval
from kdgqa_jax.console import say
from kdgqa_jax.errors import UserError, one_line, unknown
from kdgqa_jax.records import Record, Results
from kdgqa_jax.report import recipe, tables
from kdgqa_jax.report.page import Code, Figure, Lines, Section, render
from kdgqa_jax.report.tables import Table

History = dict[str, list[Record]]
"""By stage of training: the logged records, with step, allocation (L x K) and key_norm (L x K)."""


def write(
    records: Sequence[Record],
    histories: Mapping[str, History],
    folder: paths.Path,
    config: dict[str, Any] | None = None,
    baselines: Sequence[str] = (),
) -> None:
    """Write tables, plots and pages into `folder`, and print the table.

    Args:
      records: of the stages that ended, and of cells that failed (without "top1").
      histories: by entry, of one seed, what training has logged.
      folder: gets results.md, report.html, config.py, results.csv and .tex, comparisons.csv and
        .tex where entries were compared, accuracy.png and .svg and, for groups that change,
        allocation, idle_heads and key_norm likewise.
      config: of the study, as its config.json has it.
      baselines: entries that the others are compared with; none: `gqa`, or the first grouped one.
    """
    results = Results(records)
    found = [c for s in results.stages for c in comparisons.compare(records, s, baselines)]
    figures = {
        name: Figure.saved(figure, about, folder, name)
        for name, (figure, about) in _figures(results, histories, config).items()
    }
    _write_tables(results, found, folder)
    _write_text(folder / "results.md", _markdown(results, found, config))
    if config is not None:
        _write_text(folder / "config.py", recipe.config_file(config))
    _write_text(folder / "report.html", _page(results, found, figures, config))
    table = tables.overview(results)
    console.table(table.header, table.rows, "top-1 on the test images, %", numbers=True)
    say(_note(results))
    say(f"report: {folder}")


def _write_text(path: paths.Path, text: str) -> None:
    with workdir.written_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def _write_tables(results: Results, found: Sequence[Comparison], folder: paths.Path) -> None:
    figures = tables.to_csv(tables.summary(results), tables.SUMMARY)
    _write_text(folder / "results.csv", figures)
    _write_text(folder / "results.tex", tables.overview(results).latex())
    if found:
        _write_text(folder / "comparisons.csv", tables.comparisons_csv(found))
        _write_text(folder / "comparisons.tex", tables.compared(found).latex())


# --- texts ----------------------------------------------------------------------------------------


def _about(results: Results, config: dict[str, Any] | None) -> tuple[str, str]:
    """Names of the data and the models; a model that the study was given has that of its source."""
    configs = [r["config"] for r in results.records]
    names = [dict.fromkeys(c[section]["name"] for c in configs) for section in ("data", "model")]
    given = (config or {}).get("pretrain", {}).get("init", "")
    return ", ".join(names[0]), pathlib.PurePath(given).name or ", ".join(names[1])


def _note(results: Results) -> str:
    """The pretrained model, and what figures of so many seeds can say."""
    base = results.base()
    count = len(results.seeds)
    said = ""
    if base:
        shown = tables.show(*mean_and_interval([r["top1"] for r in base]))
        said = f"Pretrained mha: {shown} % of {base[0]['test_images']} test images. "
    if count > 1:
        return f"{said}± is the 95 % confidence interval of the mean over {count} seeds."
    images = results.records[-1]["test_images"]
    error = 196 * np.sqrt(0.95 * 0.05 / images)
    return (
        f"{said}One seed: at 95 % top-1 the test set alone leaves ± {error:.1f} points, so"
        " differences of that size say nothing; use --seeds for confidence intervals."
    )


def _what_stages_are(results: Results) -> str:
    said = "converted: right after the conversion of the key/value heads, no training."
    for stage, record in {r["stage"]: r for r in results.records}.items():
        config = record.get("config", {})
        if stage.startswith("uptrained"):
            said += f" {stage}: {record['steps']} steps more on the pretraining data."
        elif stage == "finetuned":
            data, shift = config["data"]["name"], config["data"]["shift"]
            images = "as they are" if shift == "none" else f"shifted ({shift})"
            said += (
                f" finetuned: epochs={config['epochs']:g} on {data}, images {images}, and"
                " evaluated on the same kind."
            )
    rules = {r["entry"]: r["rule"] for r in results.records if r.get("rule")}
    said += f" Rules of conversion: {', '.join(f'{e}: {rule}' for e, rule in rules.items())}."
    return said + " idle KV heads: how many serve no query head, over all layers, at the end."


def _what_was_compared(found: Sequence[Comparison]) -> str:
    own = sum(not c.pooled for c in found)
    alone = "" if not own else f" ({own} of {len(found)} by their own variance alone)"
    return (
        f"Top-1 less that of {' and '.join(dict.fromkeys(c.other for c in found))}, paired by seed,"
        " in points. ± is the 95 % confidence interval. p (Holm) is of paired t-tests with one"
        f" variance for all entries with the same baseline{alone}, corrected over all comparisons"
        " of a stage and data set; beside it, uncorrected, the paired t-test by its own variance"
        " and the paired permutation test. The effect is in standard deviations of the differences."
    )


def _allocations(results: Results) -> list[tuple[str, str]]:
    """(entry, allocations of its last stage, layer after layer) of the first seed."""
    found = []
    for row in results.rows:
        record = results.last(row)[min(results.last(row))]
        layers = (" ".join(map(str, layer)) for layer in record.get("allocation", ()))
        found.append((row.name, " | ".join(layers)))
    return found


def _failures(results: Results) -> list[str]:
    """A sentence for each cell that failed."""
    return [
        f"{r.get('entry')}, seed {r.get('seed')}, {r.get('stage')}:"
        f" {one_line(r.get('failed'), 500)}"
        for r in results.failed
    ]


def _markdown(results: Results, found: Sequence[Comparison], config: dict[str, Any] | None) -> str:
    data, model = _about(results, config)
    last = results.records[-1]
    failures = [f"- failed: {line}" for line in _failures(results)]
    made_by = (
        f"`{recipe.command(config)}` makes it, with the config.py beside it." if config else ""
    )
    compared = []
    if found:
        compared = [
            _what_was_compared(found),
            "",
            *tables.compared(found).markdown(),
            "",
            *(f"- {c.sentence()}" for c in found),
            "",
        ]
    lines = [
        f"# {data}, {model}: top-1 on the test images, %",
        "",
        *([made_by, ""] if made_by else []),
        *tables.overview(results).markdown(),
        "",
        _note(results),
        "",
        *([*failures, ""] if failures else []),
        *compared,
        _what_stages_are(results),
        "",
        f"Device: {last.get('device', '')}. Versions: {json.dumps(last.get('versions', {}))}.",
        "",
        "![top-1 by variant and stage](accuracy.png)",
        "",
        f"Allocation at the end ({results.stages[-1]}, first seed), one row of key/value heads per"
        " layer:",
        "",
        *(f"- {entry}: `{layers}`" for entry, layers in _allocations(results)),
    ]
    return "\n".join(lines) + "\n"


# --- the page -------------------------------------------------------------------------------------


def _figures(
    results: Results, histories: Mapping[str, History], config: dict[str, Any] | None
) -> dict[str, tuple[Any, str]]:
    """By the name of its file, a figure and what it shows."""
    data, model = _about(results, config)
    figures = {
        "accuracy": (
            plots.accuracy(results.records, f"{data}, {model}"),
            "Top-1 after each stage: means with 95 % confidence intervals; small dots are seeds.",
        )
    }
    variants = {row.name: row.variant for row in results.rows}
    dynamic = {
        name: history
        for name, history in histories.items()
        if any(history.values()) and _is_dynamic(variants.get(name, ""))
    }
    if not dynamic:
        return figures
    figures["allocation"] = (
        plots.allocation(dynamic),
        "How many query heads each key/value head serves, over the training of the first seed:"
        " a line for each key/value head, layer after layer. Dashed: the next stage begins.",
    )
    figures["idle_heads"] = (
        plots.idle_heads(dynamic),
        "The share of key/value heads that serve no query head.",
    )
    for number, (name, history) in enumerate(dynamic.items(), 1):
        file = "key_norm" if number == 1 else f"key_norm_{number}"
        about = f"Norms of the key heads of {name}, over the training of the first seed."
        figures[file] = (plots.key_norms(history, name), about)
    return figures


def _is_dynamic(variant: str) -> bool:
    """Groups can change; True for a rule that only the study's process knew."""
    return variant not in VARIANTS or VARIANTS[variant].rule.dynamic


_SHOWN = 20
"""Comparisons of a table that is not folded, at most."""


def _page(
    results: Results,
    found: Sequence[Comparison],
    figures: Mapping[str, Figure],
    config: dict[str, Any] | None,
) -> str:
    data, model = _about(results, config)
    last = results.records[-1]
    facts = [
        ("data", data),
        ("model", model),
        ("seeds", ", ".join(map(str, results.seeds))),
        ("stages", ", ".join(results.stages)),
        ("device", last.get("device", "")),
        ("versions", ", ".join(f"{n} {v}" for n, v in last.get("versions", {}).items())),
    ]
    norms = [figure for name, figure in figures.items() if name.startswith("key_norm")]
    groups = [figures[name] for name in ("allocation", "idle_heads") if name in figures]
    compared, words = [], []
    if found:
        seen = [c.sentence() for c in found if c.significant]
        compared = [
            Lines(seen) if seen else "No difference was seen.",
            _what_was_compared(found),
        ]
        words = [Lines([c.sentence() for c in found])]
        (compared if len(found) <= _SHOWN else words).append(tables.compared(found))
    allocations = Table(
        ["variant", "allocation, layer after layer"], [list(r) for r in _allocations(results)], 2
    )
    sections = [
        Section(
            "Cells that failed", [Lines(_failures(results))] if results.failed else [], bad=True
        ),
        Section("Results", [tables.overview(results), _note(results), figures["accuracy"]]),
        Section("Comparisons", compared),
        Section("Every comparison", words, folded=True),
        Section("Allocation over training", groups),
        Section("Key norms over training", norms, folded=True),
        Section("Allocations at the end", [allocations], folded=True),
        Section("Mean, deviation and interval", [tables.summary_table(results)], folded=True),
        Section("What the stages are", [_what_stages_are(results)], folded=True),
        *again(config),
    ]
    return render(f"{data}, {model}: grouped query attention compared", facts, sections)


def again(config: dict[str, Any] | None) -> list[Section]:
    """How to run it again, and all fields of its config."""
    if config is None:
        return []
    return [
        Section(
            "Run it again",
            [
                "Save this as config.py (it lies beside this page, too), and run the command.",
                Code(recipe.command(config)),
                Code(recipe.config_file(config)),
            ],
            folded=True,
        ),
        Section("Every field of the config", [Code(json.dumps(config, indent=2))], folded=True),
    ]


# --- from the directory of a study ----------------------------------------------------------------


def read(directory: paths.Path) -> tuple[list[Record], dict[str, History]]:
    """The records of a study, and by entry what training has logged in its first seed.

    Raises UserError: it has not ended, or its files are damaged.
    """
    file = directory / "report" / "results.json"
    if not file.exists():
        raise UserError(
            f"study {directory} has not ended (no {file.name}); the command that began it resumes"
            " it and writes a report at its end"
        )
    records = workdir.read_json(file)
    needed = {"entry", "stage", "seed"}
    whole = isinstance(records, list) and all(isinstance(r, dict) for r in records)
    if not whole or any(needed - r.keys() for r in records):
        raise UserError(f"{file} does not hold the records of a study; run its command again")
    results = Results(records)
    lengths = [stage for stage in results.stages if stage.startswith("uptrained")][:-1]
    histories = {}
    for row in results.rows:
        history = {}
        for stage in results.stages:
            found = results.of(row, stage)
            if found and stage not in lengths and not results.is_probe(stage):
                logged = logs.read_metrics(directory / _folder(found[min(found)]))
                history[stage] = [r for r in logged if r.get("split") == "train"]
        histories[row.name] = {stage: logged for stage, logged in history.items() if logged}
    return records, histories


def _folder(record: Record) -> str:
    """Of a stage, relative to the study; records of earlier versions have the names alone."""
    entry = record["entry"].replace(" (", "@").rstrip(")")
    old = f"seed{record['seed']}/{entry}/{record['stage'].replace(' ', '_')}"
    return record.get("folder", old)


def check(directory: paths.Path, records: Sequence[Record], baselines: Sequence[str]) -> None:
    """Raise UserError for a study whose cells all failed, or baselines that are no entries."""
    results = Results(records)
    if not results.rows:
        raise UserError(
            f"study {directory}: every cell has failed; its report/results.json has the reasons"
        )
    known = dict.fromkeys(dataclasses.replace(row, settings=()).name for row in results.rows)
    for name in baselines:
        if name not in known:
            raise unknown("baseline", name, known)
