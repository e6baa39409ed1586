"""Plots of what training has logged (metrics.jsonl), of one run or of the stages of a study."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.analysis.heads import over_training
from kdgqa_jax.plots import style

Record = dict[str, Any]
History = Mapping[str, Sequence[Record]]
"""By stage of training, the logged records in order."""

MOST_STEPS = 400
"""Of one curve: what is logged more often cannot be seen."""


def _joined(history: History, field: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Steps (n,) and values (n, L, ...) of all stages on end, and where stages after the first
    begin."""
    steps, values, ends = [], [], [0]
    for records in history.values():
        own, found = over_training(records, field)
        if len(own):
            steps.append(ends[-1] + own)
            values.append(found)
            ends.append(int(steps[-1][-1]))
    if not steps:
        return np.zeros(0, int), np.zeros((0, 0)), []
    return np.concatenate(steps), np.concatenate(values), ends[1:-1]


def _thinned(count: int) -> np.ndarray:
    """The positions of at most `MOST_STEPS` of `count` records, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_STEPS)).round().astype(int))


def _mark(axes: Any, boundaries: Sequence[int]) -> None:
    for boundary in boundaries:
        axes.axvline(boundary, color=style.GREY, linewidth=1, linestyle="--")


@style.styled
def allocation(histories: Mapping[str, History]) -> Any:
    """How many query heads each key/value head serves, over training: a panel for each entry.

    Args:
      histories: by the name of the entry, records with "step" and "allocation" (L x K).

    Returns:
      A matplotlib figure: a line for each key/value head of each layer, from top to bottom; idle
      ones stand out. Dashed lines: where the next stage begins.
    """
    from matplotlib.patches import Patch

    joined = {name: _joined(history, "allocation") for name, history in histories.items()}
    joined = {name: found for name, found in joined.items() if len(found[0])}
    tallest = max((found[1][0].size for found in joined.values()), default=8)
    count = max(len(joined), 1)
    width = 3.4 if count > 1 else 7.0
    figure, grid = style.panels(count, 3, width, min(max(0.11 * tallest, 2.0), 7.0) + 0.6)
    highest = max((found[1].max() for found in joined.values()), default=1)
    image = None
    for axes, (name, (steps, values, boundaries)) in zip(grid, joined.items(), strict=False):
        image = _allocation_panel(axes, steps, values, highest)
        _mark(axes, boundaries)
        axes.set(title=name, xlabel="training step")
    if image is not None:
        thin = 6 * figure.get_figheight()
        figure.colorbar(image, ax=grid, label="query heads", shrink=0.8, aspect=thin)
        idle = Patch(color=style.COLORS[1], label="idle: no query head")
        figure.legend(handles=[idle], loc="outside lower center")
    return figure


def _allocation_panel(axes: Any, steps: np.ndarray, values: np.ndarray, highest: float) -> Any:
    """Draw allocations (n, L, K); the image."""
    import matplotlib

    _, layers, heads = values.shape
    rows = values.reshape(len(steps), -1).T  # (L K, n)
    # The records are not evenly spaced: each column shows the last one before it.
    columns = np.linspace(steps[0], steps[-1], min(int(np.ptp(steps)) + 1, MOST_STEPS))
    shown = rows[:, np.searchsorted(steps, columns, side="right") - 1]
    colors = matplotlib.colormaps["Blues"].with_extremes(bad=style.COLORS[1])
    image = axes.imshow(
        np.ma.masked_equal(shown, 0),
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        vmin=0,
        vmax=highest,
        extent=(steps[0] - 0.5, steps[-1] + 0.5, layers * heads, 0),
    )
    for layer in range(1, layers):
        axes.axhline(layer * heads, color="white", linewidth=1.5)
    every = -(-layers // 12)
    numbers = range(0, layers, every)
    axes.set_yticks([(i + 0.5) * heads for i in numbers], [f"layer {i}" for i in numbers])
    axes.tick_params(axis="y", length=0)
    return image


@style.styled
def key_norms(history: History, title: str = "") -> Any:
    """Key head norms over training: a panel for each layer, a line for each key/value head.

    Args:
      history: records with "step" and "key_norm" (L x K).
      title: of the figure.
    """
    steps, values, boundaries = _joined(history, "key_norm")
    layers = values.shape[1] if len(steps) else 1
    figure, grid = style.panels(layers, 4, 2.5, 1.9, sharex=True)
    kept = _thinned(len(steps)) if len(steps) else slice(0)
    for layer, axes in enumerate(grid):
        for head, norms in enumerate(values[kept, layer].T if len(steps) else ()):
            look = style.cycled(head)
            del look["marker"]
            axes.plot(steps[kept], norms, label=f"head {head}", **look)
        _mark(axes, boundaries)
        axes.set(title=f"layer {layer}")
        axes.margins(x=0)
        axes.grid(axis="y")
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("norm", fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    columns = 1 if len(handles) <= 20 else 2
    figure.legend(handles, labels, loc="outside right center", ncols=columns)
    figure.suptitle(f"Key head norms: {title}" if title else "Key head norms")
    return figure


@style.styled
def idle_heads(histories: Mapping[str, History]) -> Any:
    """The share of key/value heads that serve no query head, over training.

    Args:
      histories: by the name of the entry, records with "step" and "allocation" (L x K).
    """
    figure = style.new_figure(8.0, max(2.6, 0.2 * len(histories) + 0.8))
    axes = figure.subplots()
    boundaries: list[int] = []
    for number, (name, history) in enumerate(histories.items()):
        steps, values, found = _joined(history, "allocation")
        if len(steps):
            kept = _thinned(len(steps))
            look = style.cycled(number)
            del look["marker"]
            shares = 100 * np.mean(values[kept] == 0, axis=(1, 2))
            axes.plot(steps[kept], shares, drawstyle="steps-post", label=name, **look)
            boundaries = boundaries or found
    _mark(axes, boundaries)
    axes.set(xlabel="training step", ylabel="idle key/value heads, %")
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # zero is seen too
    axes.margins(x=0)
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


_CURVES = {
    "loss": "loss, nats",
    "top1": "top-1, %",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
}
"""Of a run: field of its records, name of the axis."""


@style.styled
def training(records: Sequence[Record]) -> Any:
    """Loss, accuracy, learning rate and gradient norm of a run, over its steps.

    Args:
      records: of metrics.jsonl: lines for the batches of "train", markers for the "test" split.
    """
    fields = [field for field in _CURVES if any(field in r for r in records)]
    figure, grid = style.panels(max(len(fields), 1), 2, 4.2, 2.5)
    for axes, field in zip(grid, fields, strict=False):
        for number, (split, form) in enumerate((("train", "-"), ("test", "o--"))):
            chosen = [r for r in records if r.get("split") == split and r.get(field) is not None]
            if chosen:
                kept = _thinned(len(chosen))
                steps = np.array([r["step"] for r in chosen])[kept]
                values = np.array([r[field] for r in chosen], float)[kept]
                axes.plot(
                    steps, values, form, color=style.COLORS[number], markersize=5, label=split
                )
        axes.set(xlabel="training step", ylabel=_CURVES[field])
        axes.grid(axis="y")
        if len(axes.get_lines()) > 1:
            axes.legend()
    return figure
