"""Plots of the records of a study."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdgqa_jax.comparisons import mean_and_interval
from kdgqa_jax.plots import style
from kdgqa_jax.records import PRETRAINED, Record, Results


def _by_probe(results: Results) -> dict[str, dict[str, str]]:
    """By probe ("" for the model itself): stage of the protocol -> name of the stage in records."""
    found: dict[str, dict[str, str]] = {}
    for stage in results.stages:
        probe, _, probed = stage.partition(" ") if results.is_probe(stage) else ("", "", stage)
        found.setdefault(probe, {})[probed] = stage
    return found


@style.styled
def accuracy(records: Sequence[Record], title: str = "") -> Any:
    """Top-1 of every entry after every stage, with 95 % confidence intervals over seeds.

    Args:
      records: of results.json.
      title: of the figure.

    Returns:
      A matplotlib figure: a panel for the models and for each probe, a row for each entry, a marker
      for each stage, a small dot for each seed.
    """
    results = Results(records)
    by_probe, rows = _by_probe(results), results.rows
    stages = list(dict.fromkeys(stage for found in by_probe.values() for stage in found))
    height = max(0.17 * len(stages) + 0.18, 0.36)
    width = 8.0 if len(by_probe) == 1 else 2.0 + 3.0 * len(by_probe)
    figure = style.new_figure(width, height * len(rows) + 1.1)
    grid = figure.subplots(1, max(len(by_probe), 1), sharey=True, squeeze=False).ravel()
    labels = {}
    for axes, (probe, found) in zip(grid, by_probe.items(), strict=False):
        for number, stage in enumerate(stages):
            if stage in found:
                offset = (number - (len(stages) - 1) / 2) * 0.8 / len(stages)
                labels[stage] = _points(axes, results, found[stage], offset, number)
        if base := [r["top1"] for r in results.base(probe)]:
            look = {"color": style.GREY, "linewidth": 1, "linestyle": "--"}
            labels[PRETRAINED] = axes.axvline(np.mean(base), **look)
        for y in range(0, len(rows), 2):
            axes.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", zorder=0, linewidth=0)
        axes.set(xlabel=f"test top-1{f' of the probe {probe}' if probe else ''}, %")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    grid[0].set_yticks(range(len(rows)), [textwrap.fill(row.name, 34) for row in rows])
    grid[0].set(ylim=(len(rows) - 0.5, -0.5), title=title)
    legend = {"loc": "outside upper center", "ncols": min(len(labels), 5)}
    figure.legend(list(labels.values()), list(labels), **legend)
    return figure


def _points(axes: Any, results: Results, stage: str, offset: float, number: int) -> Any:
    """Draw a stage: means with intervals, and seeds. What the legend shows."""
    look = style.cycled(number)
    points, lowest, highest = [], 100.0, 0.0
    for y, row in enumerate(results.rows):
        if values := results.values(row, stage):
            mean, interval = mean_and_interval(values)
            points.append((mean, y + offset, interval or 0.0))
            lowest = min(lowest, *values, mean - points[-1][2])
            highest = max(highest, *values, mean + points[-1][2])
            if len(values) > 1:
                at = np.full(len(values), y + offset)
                axes.scatter(values, at, s=9, color=look["color"], alpha=0.5, linewidths=0)
    means, positions, errors = zip(*points, strict=True)
    drawn = axes.errorbar(
        means,
        positions,
        xerr=errors if any(errors) else None,
        fmt=look["marker"],
        color=look["color"],
        markersize=5,
        capsize=2,
        linewidth=1.1,
    )
    # Intervals of two seeds reach beyond what accuracy can be.
    before = axes.get_xlim() if number else (100.0, 0.0)
    axes.set_xlim(max(min(before[0], lowest - 2), -1), min(max(before[1], highest + 2), 101))
    return drawn
