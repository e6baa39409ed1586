"""Plots of records that a test makes: the same bytes each time, nothing over anything else."""

import numpy as np
import pytest

from kdgqa_jax import plots


def records(entries=("gqa", "kdgqa"), stages=("converted", "uptrained"), seeds=3):
    found = [{"entry": "pretrained", "stage": "pretrained", "seed": 0, "top1": 95.0}]
    for number, entry in enumerate(entries):
        for stage in stages:
            for seed in range(seeds):
                top1 = 60.0 + 3 * number + 10 * stages.index(stage) % 35 + seed
                heads = {"num_heads": 8, "num_kv_heads": 4}
                record = {"entry": entry, "stage": stage, "seed": seed, "top1": top1, **heads}
                found.append(record)
    return found


def history(layers=3, heads=4, steps=20):
    rng = np.random.default_rng(0)
    return [
        {
            "step": 5 * (i + 1),
            "split": "train",
            "loss": float(rng.uniform()),
            "top1": float(50 + i),
            "allocation": rng.multinomial(8, [1 / heads] * heads, layers).tolist(),
            "key_norm": rng.uniform(1, 2, (layers, heads)).tolist(),
        }
        for i in range(steps)
    ]


STAGES = {"uptrained": history(), "finetuned": history(steps=7)}
COSINE = np.clip(np.random.default_rng(0).normal(size=(2, 4, 4)), -1, 1)
GROUPS = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
RELATIONS = ("within", "between", "self")
CURVES = np.linspace(1, 0, 6).reshape(3, 2)
ALLOCATIONS = np.array([r["allocation"] for r in history()])
FIGURES = {
    "accuracy": lambda: plots.accuracy(records(), "a $title_with^signs"),
    "allocation": lambda: plots.allocation({"kdgqa": STAGES, "dgqa_ema": STAGES}),
    "key_norms": lambda: plots.key_norms(STAGES, "kdgqa"),
    "idle_heads": lambda: plots.idle_heads({"kdgqa": STAGES}),
    "training": lambda: plots.training([*history(), {"step": 9, "split": "test", "top1": 3.0}]),
    "similarity": lambda: plots.similarity({"maps": COSINE}, GROUPS),
    "noise": lambda: plots.noise([0, 1, 2], {n: {"maps": CURVES} for n in RELATIONS}, "pgqa"),
    "key_norm_spread": lambda: plots.key_norm_spread(ALLOCATIONS * 1.5 + 1),
    "allocation_spread": lambda: plots.allocation_spread(ALLOCATIONS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_the_same_each_time(tmp_path, name):
    for folder in ("a", "b"):
        plots.save(FIGURES[name](), tmp_path / folder, name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert {f.suffix for f in (tmp_path / "a").iterdir()} == {".png", ".svg"}


def test_every_plot_is_tested():
    assert FIGURES.keys() == set(plots.__all__) - {"save"}


def test_a_figure_of_a_user_is_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.idle_heads({"kdgqa": STAGES})
    assert dict(matplotlib.rcParams) == before


def boxes(figure):
    """The places of all texts that are shown, in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    shown = [
        t
        for t in figure.findobj(Text)
        if t.get_text() and t.get_visible() and t.axes is not None and t.axes.get_visible()
    ]
    return {t: t.get_window_extent() for t in shown}


def overlapping(figure):
    found = list(boxes(figure).items())
    return [
        (a.get_text(), b.get_text())
        for i, (a, box) in enumerate(found)
        for b, other in found[i + 1 :]
        if a.get_text() and box.width and other.width and box.overlaps(other)
    ]


def test_a_grid_of_entries_and_stages_has_no_texts_over_each_other():
    """Six variants, two K, three stages and two probes of each."""
    variants = ("gqa", "gqa (svd)", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa")
    stages = ("converted", "uptrained", "finetuned")
    probes = tuple(f"{probe} {stage}" for probe in ("knn", "linear") for stage in stages)
    entries = ("mha", *(f"{v}, K={k}" for v in variants for k in (2, 3)))
    figure = plots.accuracy(records(entries, (*stages, *probes)), "digits")
    assert [len(axes.get_xlabel()) > 0 for axes in figure.axes] == [True] * 3
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(entries)
    assert overlapping(figure) == []


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.allocation({f"dgqa_ema, K={k}": {"u": history(12, k)} for k in (3, 6)}),
        lambda: plots.key_norms({"uptrained": history(12, 6)}),
        lambda: plots.key_norm_spread(np.random.default_rng(0).uniform(1, 2, (9, 12, 6))),
        lambda: plots.similarity(
            {"maps": np.ones((12, 12, 12))}, np.tile(np.repeat(range(6), 2), (12, 1))
        ),
    ],
    ids=["allocation", "key_norms", "key_norm_spread", "similarity"],
)
def test_twelve_layers_have_no_texts_over_each_other(figure):
    assert overlapping(figure()) == []


def test_what_is_logged_without_end_is_thinned():
    lines = plots.key_norms({"u": history(1, 2, 900)}).axes[0].get_lines()
    assert max(len(line.get_xdata()) for line in lines) <= 400
    assert lines[0].get_xdata()[-1] == 4500
