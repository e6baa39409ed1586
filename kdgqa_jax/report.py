"""The report of a study: results.json, a table, and plots."""

import json
import pathlib
from typing import Any

import numpy as np

from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import VARIANTS, variant_name
from kdgqa_jax.console import say, table

Record = dict[str, Any]
History = dict[str, list[Record]]
"""By stage of training: the logged records, with step, allocation (L x K) and key_norm (L x K)."""

TRAINED = ("uptrained", "finetuned")
AFTER_CONVERSION = ("converted", *TRAINED)
_COLORS = {"converted": "#b0b7c3", "uptrained": "#4c8dc9", "finetuned": "#e07b39"}


def write(records: list[Record], histories: dict[str, History], folder: pathlib.Path) -> None:
    """Write the files into `folder` and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(folder / "results.json", records)
    header, rows = _table(records)
    note = _note(records)
    (folder / "results.md").write_text(_markdown(records, header, rows, note))
    _plot_accuracy(records, folder / "accuracy.png")
    dynamic = {name: h for name, h in histories.items() if VARIANTS[variant_name(name)].rule}
    if dynamic:
        for field in _LAYER_PLOTS:
            _plot_layers(dynamic, records, field, folder / f"{field}.png")
    table(header, rows, "top-1 on the test images, %", numbers=True)
    say(note)
    say(f"report: {folder}")


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % confidence interval (Student's t); None for one value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy import stats

    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * spread)


def _values(records: list[Record], variant: str, stage: str, field: str = "top1") -> list[float]:
    return [r[field] for r in records if (r["variant"], r["stage"]) == (variant, stage)]


def _variants(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["variant"] for r in records if r["stage"] != "pretrained"))


def _show(values: list[float]) -> str:
    mean, interval = mean_and_interval(values)
    return f"{mean:.2f}" if interval is None else f"{mean:.2f} ± {interval:.2f}"


def _table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    header = ["variant", "heads", "KV heads", "KV parameters", *AFTER_CONVERSION, "idle KV heads"]
    rows = []
    for variant in _variants(records):
        last = next(r for r in records if r["variant"] == variant and r["stage"] == "finetuned")
        idle = np.mean(_values(records, variant, "finetuned", "idle_kv_heads"))
        layers = len(last["allocation"])
        rows.append(
            [
                variant,
                str(last["num_heads"]),
                str(last["num_kv_heads"]),
                f"{last['num_kv_params']:,}",
                *(_show(_values(records, variant, stage)) for stage in AFTER_CONVERSION),
                f"{idle:.3g} of {layers * last['num_kv_heads']}",
            ]
        )
    return header, rows


def _note(records: list[Record]) -> str:
    base = [r for r in records if r["stage"] == "pretrained"]
    images = base[0]["test_images"]
    pretrained = f"Pretrained mha: {_show([r['top1'] for r in base])} % of {images} test images."
    if len(base) > 1:
        return f"{pretrained} ± is the 95 % confidence interval of the mean over {len(base)} seeds."
    error = 196 * np.sqrt(0.95 * 0.05 / images)
    return (
        f"{pretrained} One seed: at 95 % top-1 the test set alone leaves ± {error:.1f} points, so"
        " differences of that size say nothing; use --seeds for confidence intervals."
    )


def _markdown(records: list[Record], header: list[str], rows: list[list[str]], note: str) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    last = records[-1]["config"]
    uptrain = next(r["config"] for r in records if r["stage"] == "uptrained")
    lines = [
        f"# {last['data']['name']}, {last['model']['name']}: top-1 on the test images, %",
        "",
        line(header),
        line(["---", *["---:"] * (len(header) - 1)]),
        *map(line, rows),
        "",
        note,
        "",
        "converted: right after pooling the key/value heads, no training."
        f" uptrained: {uptrain['epochs']:g} epochs more on the pretraining data."
        f" finetuned: {last['epochs']:g} epochs on the same images, shifted"
        f" ({last['data']['shift']}), and evaluated on those."
        " idle KV heads: how many serve no query head, over all layers, after fine-tuning.",
        "",
        f"Device: {records[-1]['device']}. Versions: {json.dumps(records[-1]['versions'])}.",
        "",
        "![top-1 by variant and stage](accuracy.png)",
        "",
        "![allocation over training](allocation.png)",
        "",
        "![key head norms over training](key_norm.png)",
        "",
        "Allocation after fine-tuning (first seed), one row of key/value heads per layer:",
        "",
    ]
    for variant in _variants(records):
        record = next(r for r in records if r["variant"] == variant and r["stage"] == "finetuned")
        layers = "  ".join(" ".join(map(str, layer)) for layer in record["allocation"])
        lines.append(f"- {variant}: `{layers}`")
    return "\n".join(lines) + "\n"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot_accuracy(records: list[Record], path: pathlib.Path) -> None:
    plt = _pyplot()
    variants = _variants(records)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(AFTER_CONVERSION)
    for i, stage in enumerate(AFTER_CONVERSION):
        stats = [mean_and_interval(_values(records, variant, stage)) for variant in variants]
        x = np.arange(len(variants)) + (i - 1) * width
        errors = None if stats[0][1] is None else [interval for _, interval in stats]
        means = [mean for mean, _ in stats]
        bars = axes.bar(x, means, width, yerr=errors, label=stage, color=_COLORS[stage], capsize=3)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    base, _ = mean_and_interval([r["top1"] for r in records if r["stage"] == "pretrained"])
    line = {"color": "gray", "linewidth": 1, "linestyle": "--", "zorder": 0}
    axes.axhline(base, label="pretrained mha", **line)
    axes.set_xticks(np.arange(len(variants)), variants)
    axes.set(ylabel="test top-1, %", ylim=(0, 112), yticks=range(0, 101, 20))
    config = records[-1]["config"]
    axes.set_title(f"{config['data']['name']}, {config['model']['name']}: accuracy by stage")
    axes.legend(ncols=4, loc="upper center", fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


_LAYER_PLOTS = {
    "allocation": ("Query heads per key/value head", "query heads"),
    "key_norm": ("Key head norms", "norm"),
}
"""What is plotted by layer over training: title and name of the axis."""


def _plot_layers(
    histories: dict[str, History], records: list[Record], field: str, path: pathlib.Path
) -> None:
    """One row per variant, one column per layer, over uptraining and fine-tuning."""
    plt = _pyplot()
    title, ylabel = _LAYER_PLOTS[field]
    num_heads = records[-1]["num_heads"]
    layers = len(records[-1]["allocation"])
    figure, grid = plt.subplots(
        len(histories),
        layers,
        figsize=(2.6 * layers + 1.2, 2.2 * len(histories) + 0.8),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (variant, history) in zip(grid, histories.items(), strict=True):
        boundary = history["uptrained"][-1]["step"]
        steps = [r["step"] for r in history["uptrained"]]
        steps += [boundary + r["step"] for r in history["finetuned"]]
        values = np.array([r[field] for stage in TRAINED for r in history[stage]])
        for layer, axes in enumerate(row):
            heads = values[:, layer].T  # (K, steps)
            colors = plt.colormaps["viridis"](np.linspace(0.1, 0.95, len(heads)))
            labels = [f"KV head {k}" for k in range(len(heads))]
            if field == "allocation":
                axes.stackplot(steps, heads, step="post", colors=colors, labels=labels)
                axes.set(ylim=(0, num_heads), yticks=range(0, num_heads + 1, 2))
            else:
                for values_of_head, color, label in zip(heads, colors, labels, strict=True):
                    axes.plot(steps, values_of_head, color=color, label=label)
            axes.axvline(boundary, color="gray", linewidth=1, linestyle="--")
            axes.margins(x=0)
        row[0].set_ylabel(f"{variant}\n{ylabel}")
    for layer, (top, bottom) in enumerate(zip(grid[0], grid[-1], strict=True)):
        top.set_title(f"layer {layer}")
        bottom.set_xlabel("training step")
    figure.suptitle(f"{title} (dashed: fine-tuning begins)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
