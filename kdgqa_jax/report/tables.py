"""Tables of a study: what is in them, and how they are written (Markdown, CSV, LaTeX)."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdgqa_jax.comparisons import Comparison, mean_and_interval
from kdgqa_jax.records import Results


class Table(NamedTuple):
    """Texts of a table; the columns after the first `texts` ones are numbers."""

    header: list[str]
    rows: list[list[str]]
    texts: int = 1

    def markdown(self) -> list[str]:
        """Its lines in Markdown."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.header) - self.texts)
        return [_line(self.header), _line(rule), *map(_line, self.rows)]

    def latex(self) -> str:
        """A LaTeX `tabular`; its rules are those of the package booktabs."""
        columns = "l" * self.texts + "r" * (len(self.header) - self.texts)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex(self.header), r"\midrule"]
        return "\n".join([*lines, *map(_latex, self.rows), r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


_ESCAPES = str.maketrans(
    {
        **{c: f"\\{c}" for c in "_%&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
)


def _latex(cells: Iterable[str]) -> str:
    return " & ".join(cell.translate(_ESCAPES) for cell in cells) + r" \\"


def to_csv(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """Rows as CSV, numbers unrounded."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def show(mean: float, interval: float | None) -> str:
    """A mean and, where it is known, the half-width of its confidence interval."""
    return f"{mean:.2f}" if interval is None else f"{mean:.2f} ± {interval:.2f}"


def overview(results: Results) -> Table:
    """A row for each entry: sizes, top-1 after each stage (mean and interval), idle heads."""
    header = ["variant", "heads", "KV heads", "KV parameters", *results.stages, "idle KV heads"]
    rows = []
    for row in results.rows:
        last = results.last(row)
        one = next(iter(last.values()))
        top1 = [results.values(row, stage) for stage in results.stages]
        idle = ""
        if "allocation" in one:
            count = len(one["allocation"]) * one["num_kv_heads"]
            idle = f"{np.mean([r['idle_kv_heads'] for r in last.values()]):.3g} of {count}"
        rows.append(
            [
                row.name,
                str(one["num_heads"]),
                str(one["num_kv_heads"]),
                f"{one['num_kv_params']:,}",
                *(show(*mean_and_interval(values)) if values else "" for values in top1),
                idle,
            ]
        )
    return Table(header, rows)


SUMMARY = ("entry", "stage", "seeds", "mean", "deviation", "interval", "lowest", "highest")
"""Fields of `summary`; deviation and interval (half-width, 95 %) are None for one seed."""


def summary(results: Results) -> list[dict[str, Any]]:
    """Top-1 of every entry after every stage, over seeds, in percent and unrounded."""
    found = []
    for stage in results.stages:
        for row in results.rows_at(stage):
            values = results.values(row, stage)
            mean, interval = mean_and_interval(values)
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            figures = (len(values), mean, deviation, interval, min(values), max(values))
            found.append(dict(zip(SUMMARY, (row.name, stage, *figures), strict=True)))
    return found


def summary_table(results: Results) -> Table:
    """`summary` as texts."""

    def text(value: Any) -> str:
        return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)

    header = ["variant", *SUMMARY[1:]]
    return Table(header, [[text(r[field]) for field in SUMMARY] for r in summary(results)], 2)


_COMPARED = {
    "variant": lambda c: c.entry,
    "against": lambda c: c.other,
    "stage": lambda c: c.stage,
    "seeds": lambda c: str(c.pairs),
    "difference": lambda c: f"{c.difference:+.2f} ± {c.interval:.2f}",
    "p (Holm)": lambda c: f"{c.p_holm:.2g}",
    "p (paired t)": lambda c: f"{c.p_t:.2g}",
    "p (permutation)": lambda c: f"{c.p_permutation:.2g}",
    "effect": lambda c: f"{c.effect:.2f}",
}
"""Of the table of comparisons: header and cell."""


def compared(found: Sequence[Comparison]) -> Table:
    """A row for each comparison."""
    return Table(list(_COMPARED), [[cell(c) for cell in _COMPARED.values()] for c in found], 3)


def comparisons_csv(found: Sequence[Comparison]) -> str:
    """All figures of the comparisons, unrounded."""
    fields = [field.name for field in dataclasses.fields(Comparison)]
    return to_csv([dataclasses.asdict(c) for c in found], fields)
