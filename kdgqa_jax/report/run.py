"""The report of one training run: report.html with its curves, allocations and config."""

import json
from typing import Any

from kdgqa_jax import logs, paths, plots, workdir
from kdgqa_jax.console import say
from kdgqa_jax.report.page import Code, Figure, Section, render
from kdgqa_jax.report.study import again
from kdgqa_jax.report.tables import Table


def write(directory: paths.Path, folder: paths.Path) -> None:
    """Write report.html, config.py and plots into `folder`, from the directory of a run.

    The run may still be going, or have been stopped.

    Raises UserError: a file of the run that is damaged, or a folder that cannot be written.
    """
    from kdgqa_jax.report import recipe

    config = workdir.read_json(directory / "config.json")
    records = logs.read_metrics(directory)
    result = _read(directory / "result.json")
    figures = {
        name: Figure.saved(figure, about, folder, name)
        for name, (figure, about) in _figures(records).items()
    }
    with workdir.written_file(folder / "config.py") as path:
        path.write_text(recipe.config_file(config), "utf-8")
    with workdir.written_file(folder / "report.html") as path:
        path.write_text(_page(directory, config, records, result, figures), "utf-8")
    say(f"report: {folder}")


def _read(path: paths.Path) -> dict[str, Any]:
    """The content of a JSON file that the run writes at some time; {} before."""
    return workdir.read_json(path) if path.exists() else {}


def _figures(records: list[dict[str, Any]]) -> dict[str, tuple[Any, str]]:
    """By the name of its file, a figure and what it shows."""
    figures, history = {}, {"train": records}
    if records:
        about = "What the run logged, by its steps."
        figures["training"] = (plots.training(records), about)
    if any("allocation" in r for r in records):
        figures["allocation"] = (
            plots.allocation({"": history}),
            "How many query heads each key/value head serves: a line for each key/value head, layer"
            " after layer.",
        )
    if any("key_norm" in r for r in records):
        figures["key_norm"] = (plots.key_norms(history), "Norms of the key heads.")
    return figures


def _tests(records: list[dict[str, Any]]) -> list[Table]:
    """What evaluations on the test split came to."""
    tests = [r for r in records if r.get("split") == "test"]
    if not tests:
        return []
    header = ["step", "epoch", "top-1, %", "top-5, %", "loss"]
    rows = [
        [
            f"{r['step']:,}",
            f"{r['epoch']:.2f}",
            *("" if r.get(n) is None else f"{r[n]:.{d}f}" for n, d in _TESTED.items()),
        ]
        for r in tests
    ]
    return [Table(header, rows, 0)]


_TESTED = {"top1": 2, "top5": 2, "loss": 4}
"""Of the tests: fields and digits."""


def _page(
    directory: paths.Path,
    config: dict[str, Any],
    records: list[dict[str, Any]],
    result: dict[str, Any],
    figures: dict[str, Figure],
) -> str:
    description = _read(directory / "model" / "model.json")
    data, model = config["data"]["name"], config["model"]
    reached = max((r["step"] for r in records), default=0)
    facts = [
        ("data", data),
        ("model", f"{model['name']}, attention {model['attention']}"),
        ("starts from", config["init"] or "random weights"),
        ("seed", str(config["seed"])),
    ]
    if result:
        facts += [
            ("steps", f"{result['steps']:,} in {result['seconds']:.0f} s"),
            ("test top-1", f"{result['top1']:.2f} % (best {result['best_top1']:.2f} %)"),
            ("test loss", f"{result['loss']:.4f}"),
            ("updates left out", str(result["skipped_updates"])),
        ]
    else:
        facts.append(("steps", f"{reached:,}: the run has not ended"))
    versions = description.get("versions", {})
    if versions:
        facts.append(("versions", ", ".join(f"{n} {v}" for n, v in versions.items())))
    allocation = []
    if result.get("allocation"):
        rows = [
            [str(i), " ".join(map(str, layer)), str(sum(not x for x in layer))]
            for i, layer in enumerate(result["allocation"])
        ]
        allocation = [Table(["layer", "allocation at the end", "idle KV heads"], rows, 2)]
    identity = _read(directory / "data.json")
    sections = [
        Section("Curves", [figures[n] for n in ("training",) if n in figures]),
        Section("Tests", _tests(records), folded=len(_tests(records)) > 10),
        Section("Allocation", [*(figures[n] for n in figures if n == "allocation"), *allocation]),
        Section("Key norms", [figures[n] for n in figures if n == "key_norm"]),
        *again(config),
        Section(
            "The data", [Code(json.dumps(identity, indent=2))] if identity else [], folded=True
        ),
    ]
    return render(f"{data}, {model['name']} {model['attention']}: a training run", facts, sections)
