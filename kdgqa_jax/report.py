"""The report of a study: results.json, a table, and plots."""

import json
import pathlib
from typing import Any

import numpy as np

from kdgqa_jax import comparisons
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.comparisons import mean_and_interval
from kdgqa_jax.console import say, table

Record = dict[str, Any]
History = dict[str, list[Record]]
"""By stage of training: the logged records, with step, allocation (L x K) and key_norm (L x K)."""

_COLORS = ("#b0b7c3", "#4c8dc9", "#e07b39", "#5aa469", "#8e6fb0")  # of stages, in turns


def write(records: list[Record], histories: dict[str, History], folder: pathlib.Path) -> None:
    """Write the files into `folder` and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(folder / "results.json", records)
    header, rows = _table(records)
    note = _note(records)
    found = [c for stage in _stages(records) for c in comparisons.compare(records, stage)]
    if found:
        comparisons.write(found, folder)
    (folder / "results.md").write_text(_markdown(records, header, rows, note, found), "utf-8")
    _plot_accuracy(records, folder / "accuracy.png")
    variants = {r["entry"]: r["variant"] for r in records}
    dynamic = {
        name: h for name, h in histories.items() if h and VARIANTS[variants[name]].rule.dynamic
    }
    if dynamic:
        for field in _LAYER_PLOTS:
            _plot_layers(dynamic, records, field, folder / f"{field}.png")
    table(header, rows, "top-1 on the test images, %", numbers=True)
    say(note)
    say(f"report: {folder}")


def _values(records: list[Record], entry: str, stage: str, field: str = "top1") -> list[float]:
    return [r[field] for r in records if (r["entry"], r["stage"]) == (entry, stage)]


def _entries(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["entry"] for r in records if r["stage"] != "pretrained"))


def _stages(records: list[Record]) -> list[str]:
    """Those after pretraining, in order."""
    return list(dict.fromkeys(r["stage"] for r in records if r["stage"] != "pretrained"))


def _show(mean: float, interval: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" if interval is None else f"{mean:{sign}.2f} ± {interval:.2f}"


def _table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    stages = _stages(records)
    header = ["variant", "heads", "KV heads", "KV parameters", *stages, "idle KV heads"]
    rows = []
    for entry in _entries(records):
        last = next(r for r in records if (r["entry"], r["stage"]) == (entry, stages[-1]))
        idle = np.mean(_values(records, entry, stages[-1], "idle_kv_heads"))
        layers = len(last["allocation"])
        rows.append(
            [
                entry,
                str(last["num_heads"]),
                str(last["num_kv_heads"]),
                f"{last['num_kv_params']:,}",
                *(_show(*mean_and_interval(_values(records, entry, stage))) for stage in stages),
                f"{idle:.3g} of {layers * last['num_kv_heads']}",
            ]
        )
    return header, rows


def _paired_lines(found: list[comparisons.Comparison]) -> list[str]:
    """A table of what was compared, and a sentence for each; [] for one seed."""
    if not found:
        return []
    header, rows = comparisons.table(found)
    return [
        f"Top-1 less that of {found[0].other}, paired by seed, in points. ± is the 95 % confidence"
        " interval, p is of the paired t-test, corrected over the variants of a stage, and of the"
        " paired permutation test; the effect is in standard deviations of the differences:",
        "",
        _line(header),
        _line(["---", "---", "---", *["---:"] * (len(header) - 3)]),
        *map(_line, rows),
        "",
        *(f"- {c.sentence()}" for c in found),
        "",
    ]


def _note(records: list[Record]) -> str:
    base = [r for r in records if r["stage"] == "pretrained"]
    images = base[0]["test_images"]
    shown = _show(*mean_and_interval([r["top1"] for r in base]))
    pretrained = f"Pretrained mha: {shown} % of {images} test images."
    if len(base) > 1:
        return f"{pretrained} ± is the 95 % confidence interval of the mean over {len(base)} seeds."
    error = 196 * np.sqrt(0.95 * 0.05 / images)
    return (
        f"{pretrained} One seed: at 95 % top-1 the test set alone leaves ± {error:.1f} points, so"
        " differences of that size say nothing; use --seeds for confidence intervals."
    )


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(
    records: list[Record],
    header: list[str],
    rows: list[list[str]],
    note: str,
    compared: list[comparisons.Comparison],
) -> str:
    stages, last = _stages(records), records[-1]["config"]
    lines = [
        f"# {last['data']['name']}, {last['model']['name']}: top-1 on the test images, %",
        "",
        _line(header),
        _line(["---", *["---:"] * (len(header) - 1)]),
        *map(_line, rows),
        "",
        note,
        "",
        *_paired_lines(compared),
        _what_stages_are(records),
        "",
        f"Device: {records[-1]['device']}. Versions: {json.dumps(records[-1]['versions'])}.",
        "",
        "![top-1 by variant and stage](accuracy.png)",
        "",
        "![allocation over training](allocation.png)",
        "",
        "![key head norms over training](key_norm.png)",
        "",
        f"Allocation at the end ({stages[-1]}, first seed), one row of key/value heads per layer:",
        "",
    ]
    for entry in _entries(records):
        record = next(r for r in records if (r["entry"], r["stage"]) == (entry, stages[-1]))
        layers = "  ".join(" ".join(map(str, layer)) for layer in record["allocation"])
        lines.append(f"- {entry}: `{layers}`")
    return "\n".join(lines) + "\n"


def _what_stages_are(records: list[Record]) -> str:
    of_stage = {r["stage"]: r for r in records}
    said = "converted: right after the conversion of the key/value heads, no training."
    for stage, record in of_stage.items():
        config = record["config"]
        if stage.startswith("uptrained"):
            said += f" {stage}: {record['steps']} steps more on the pretraining data."
        elif stage == "finetuned":
            said += (
                f" finetuned: {config['epochs']:g} epochs on the same images, shifted"
                f" ({config['data']['shift']}), and evaluated on those."
            )
    rules = {r["entry"]: r["rule"] for r in records if r["rule"]}
    said += f" Rules of conversion: {', '.join(f'{e}: {rule}' for e, rule in rules.items())}."
    return said + " idle KV heads: how many serve no query head, over all layers, at the end."


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot_accuracy(records: list[Record], path: pathlib.Path) -> None:
    plt = _pyplot()
    entries, stages = _entries(records), _stages(records)
    figure, axes = plt.subplots(figsize=(max(9, 1.4 * len(entries)), 4.5), layout="constrained")
    width = 0.8 / len(stages)
    for i, stage in enumerate(stages):
        stats = [mean_and_interval(_values(records, entry, stage)) for entry in entries]
        x = np.arange(len(entries)) + (i - (len(stages) - 1) / 2) * width
        errors = None if stats[0][1] is None else [interval for _, interval in stats]
        means, color = [mean for mean, _ in stats], _COLORS[i % len(_COLORS)]
        bars = axes.bar(x, means, width, yerr=errors, label=stage, color=color, capsize=3)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    base, _ = mean_and_interval([r["top1"] for r in records if r["stage"] == "pretrained"])
    line = {"color": "gray", "linewidth": 1, "linestyle": "--", "zorder": 0}
    axes.axhline(base, label="pretrained mha", **line)
    labels = [entry.replace(" (", "\n(") for entry in entries]
    axes.set_xticks(np.arange(len(entries)), labels)
    axes.set(ylabel="test top-1, %", ylim=(0, 112), yticks=range(0, 101, 20))
    config = records[-1]["config"]
    axes.set_title(f"{config['data']['name']}, {config['model']['name']}: accuracy by stage")
    axes.legend(ncols=len(stages) + 1, loc="upper center", fontsize=9, frameon=False)
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
    """One row per entry, one column per layer, over uptraining and fine-tuning."""
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
    for row, (entry, history) in zip(grid, histories.items(), strict=True):
        steps, boundaries, end = [], [], 0
        for stage in history.values():
            steps += [end + r["step"] for r in stage]
            end += stage[-1]["step"]
            boundaries.append(end)
        values = np.array([r[field] for stage in history.values() for r in stage])
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
            for boundary in boundaries[:-1]:
                axes.axvline(boundary, color="gray", linewidth=1, linestyle="--")
            axes.margins(x=0)
        row[0].set_ylabel(f"{entry}\n{ylabel}")
    for layer, (top, bottom) in enumerate(zip(grid[0], grid[-1], strict=True)):
        top.set_title(f"layer {layer}")
        bottom.set_xlabel("training step")
    figure.suptitle(f"{title} (dashed: fine-tuning begins)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
