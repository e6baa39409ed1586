"""Plots of an analysis of heads (kdgqa_jax.analysis)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.plots import style


@style.styled
def similarity(cosine: Mapping[str, np.ndarray], group_index: np.ndarray) -> Any:
    """Cosines of heads with each other: a row of panels for each kind, a panel for each layer.

    Args:
      cosine: by what is compared ("maps", "outputs"), (L, N, N).
      group_index: (L, N): the key/value head of each query head; groups are framed.
    """
    from matplotlib.patches import Rectangle

    layers = len(group_index)
    columns = min(layers, 6)
    rows = -(-layers // columns)
    figure = style.new_figure(1.55 * columns + 0.9, 1.75 * rows * len(cosine) + 0.4)
    parts = figure.subfigures(len(cosine), 1, squeeze=False).ravel()
    for part, (kind, matrices) in zip(parts, cosine.items(), strict=True):
        grid = part.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for layer, axes in enumerate(grid):
            if layer >= layers:
                axes.set_visible(False)
                continue
            image = axes.imshow(matrices[layer], cmap="cividis", vmin=_lowest(matrices), vmax=1)
            first = 0
            for size in np.unique(group_index[layer], return_counts=True)[1]:
                corner = (first - 0.5, first - 0.5)
                axes.add_patch(Rectangle(corner, size, size, fill=False, color="white", lw=1.3))
                first += size
            heads = range(0, len(matrices[layer]), 1 if len(matrices[layer]) <= 8 else 4)
            axes.set(title=f"layer {layer}", xticks=heads, yticks=heads)
            axes.tick_params(length=0)
        part.colorbar(image, ax=list(grid), label="cosine", shrink=0.9)
        part.suptitle(f"Query heads by their {kind}")
    return figure


def _lowest(matrices: np.ndarray) -> float:
    """Where the colours begin: 0, or below the smallest cosine if that is negative."""
    return min(0.0, float(np.floor(10 * np.nanmin(matrices)) / 10))


_RELATIONS = {
    "within": "within groups",
    "between": "between groups",
    "self": "before and after the noise",
}


@style.styled
def noise(
    noise_scales: Sequence[float], found: Mapping[str, Mapping[str, np.ndarray]], title: str = ""
) -> Any:
    """Similarity of heads over the scales of PGQA's noise: a panel for maps, one for outputs.

    Args:
      noise_scales: (P,).
      found: by "within", "between" and "self", then by what is compared, (P, L): thick lines are
        the means over layers, thin ones the layers.
      title: of the figure.
    """
    kinds = list(next(iter(found.values())))
    figure, grid = style.panels(len(kinds), 2, 4.0, 3.0, sharey=True)
    for axes, kind in zip(grid, kinds, strict=True):
        for number, (relation, label) in enumerate(_RELATIONS.items()):
            values = np.asarray(found[relation][kind])
            if np.isnan(values).all():
                continue
            look = style.cycled(number)
            axes.plot(noise_scales, values, color=look["color"], linewidth=0.6, alpha=0.4)
            axes.plot(noise_scales, np.nanmean(values, axis=1), label=label, markersize=4, **look)
        axes.set(title=kind, xlabel="scale of the noise")
        axes.grid(axis="y")
    grid[0].set_ylabel("cosine of heads")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    if title:
        figure.suptitle(title)
    return figure


@style.styled
def key_norm_spread(key_norms: np.ndarray) -> Any:
    """Key norms over images: a panel for each layer, a box for each key/value head.

    Args:
      key_norms: (n, L, K). Boxes hold the middle half of the images, whiskers 90 %.
    """
    _, layers, heads = key_norms.shape
    figure, grid = style.panels(layers, 4, max(0.24 * heads + 0.9, 2.2), 2.0, sharex=True)
    for layer, axes in enumerate(grid):
        axes.boxplot(
            key_norms[:, layer],
            positions=range(heads),
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            widths=0.65,
            boxprops={"facecolor": "#bcd9ec", "edgecolor": style.COLORS[0]},
            medianprops={"color": style.COLORS[1]},
        )
        step = 1 if heads <= 8 else 4
        axes.set_xticks(range(0, heads, step), range(0, heads, step))
        axes.set(title=f"layer {layer}")
        axes.grid(axis="y")
    figure.supxlabel("key/value head", fontsize=9)
    figure.supylabel("norm of the keys of an image", fontsize=9)
    return figure


@style.styled
def allocation_spread(allocations: np.ndarray) -> Any:
    """Mean query heads per key/value head over batches (or images), and how often each is idle.

    Args:
      allocations: (n, L, K).
    """
    _, layers, heads = allocations.shape
    means, idle = allocations.mean(axis=0), np.mean(allocations == 0, axis=0)
    figure = style.new_figure(max(0.75 * heads, 3.0) + 1.6, 0.38 * layers + 1.1)
    axes = figure.subplots()
    image = axes.imshow(means, cmap="Blues", vmin=0, aspect="auto")
    for layer in range(layers):
        for head in range(heads):
            text = f"{means[layer, head]:.3g}"
            if idle[layer, head]:
                text += f"\nidle {100 * idle[layer, head]:.0f} %"
            dark = means[layer, head] > 0.6 * means.max()
            color = "white" if dark else "black"
            axes.text(head, layer, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
    axes.set_xticks(range(heads), range(heads))
    axes.set(xlabel="key/value head")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="query heads, mean")
    return figure
