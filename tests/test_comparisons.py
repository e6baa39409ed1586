"""Statistics of a study: against scipy and closed forms, and by simulation of many studies."""

import csv
import math
import re

import numpy as np
import pytest
import simulate_comparisons
from scipy import stats

from kdgqa_jax import comparisons
from kdgqa_jax.report import tables

ENTRIES = ("gqa", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa", "gqa (svd)")


def study(top1, stage="finetuned"):
    """Records of entries (E, seeds) of top-1, and of the pretrained model."""
    common = {"num_heads": 8, "num_kv_heads": 4, "stage": stage}
    return [
        {**common, "entry": entry, "seed": seed, "top1": value}
        for entry, values in zip(ENTRIES, top1, strict=False)
        for seed, value in enumerate(values)
    ]


def test_interval_is_students():
    mean, interval = comparisons.mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)  # t(0.975, 2) s / sqrt(n)
    assert comparisons.mean_and_interval([5.0]) == (5.0, None)


def test_tests_equal_scipys():
    rng = np.random.default_rng(0)
    for count in (2, 5, 9):
        a, b = rng.normal(size=(2, count))
        expected = stats.ttest_rel(a, b).pvalue
        assert comparisons.paired_t_test(a - b) == pytest.approx(expected, rel=1e-9)
        expected = stats.permutation_test(
            (a, b), lambda a, b: abs(np.mean(a - b)), permutation_type="samples",
            alternative="greater", n_resamples=np.inf,
        ).pvalue  # fmt: skip
        assert comparisons.permutation_test(a - b) == pytest.approx(expected, rel=1e-9)
    many = rng.normal(0.3, 1.0, 40)  # by chance
    assert comparisons.permutation_test(many) == pytest.approx(
        comparisons.paired_t_test(many), abs=0.02
    )


def test_differences_that_do_not_vary():
    assert comparisons.paired_t_test([0.0, 0.0]) == comparisons.permutation_test([0.0, 0.0]) == 1
    assert comparisons.paired_t_test([2.0, 2.0, 2.0]) == 0.0
    (found,) = comparisons.compare(study([[1.0, 2.0], [3.0, 4.0]]), "finetuned")
    assert found.effect == math.inf and found.difference == 2.0 and found.interval == 0.0
    with pytest.raises(ValueError, match="at least two pairs, got 1"):
        comparisons.paired_t_test([1.0])


def test_holms_correction():
    # Worked by hand: 4 x 0.01, 3 x 0.013, 2 x 0.03 and 0.04, none below the one before.
    assert comparisons.holm([0.01, 0.04, 0.03, 0.013]) == pytest.approx([0.04, 0.06, 0.06, 0.04])
    assert comparisons.holm([0.6, 0.9]) == [1.0, 1.0] and comparisons.holm([]) == []


def test_seeds_are_paired_and_the_first_grouped_entry_is_compared_with():
    records = study([(50.0, 60.0, 90.0), (51.0, 63.0, 95.0)])
    records += [{**records[0], "entry": "mha", "num_kv_heads": 8, "top1": 99.0}]
    records += [{**records[-2], "seed": 9}]  # which only one has
    (found,) = comparisons.compare(records[::-1][::-1], "finetuned")
    assert (found.entry, found.other, found.pairs) == ("kdgqa", "gqa", 3)
    assert found.difference == 3.0  # of 1, 3 and 5
    assert found.interval == pytest.approx(4.302653 * 2 / np.sqrt(3), rel=1e-5)
    assert found.effect == pytest.approx(1.5)
    assert comparisons.compare(records, "converted") == []
    assert comparisons.compare(study([[1.0], [2.0]]), "finetuned") == []


def naive_pooled(differences):
    """p of each comparison by the formulas of docs/analysis.md, for seeds that all have."""
    d = np.array(differences)
    m, n = d.shape
    freedom = m * (n - 1) / (1 + (m - 1) / 4)
    statistic = d.mean(1) / np.sqrt(d.var(1, ddof=1).mean() / n)
    return 2 * stats.t.cdf(-np.abs(statistic), freedom), freedom


def test_pooled_tests_share_one_variance():
    d = np.random.default_rng(3).normal(size=(5, 6))
    d = stats.zscore(d, axis=1) * np.linspace(0.8, 1.2, 5)[:, None] + np.arange(5)[:, None]
    found = comparisons.pooled_t_tests(d.tolist())
    expected, freedom = naive_pooled(d)
    assert [t.p for t in found] == pytest.approx(expected, rel=1e-9)
    width = stats.t.interval(0.95, freedom, scale=np.sqrt(d.var(1, ddof=1).mean() / 6))[1]
    assert all(t.pooled and t.interval == pytest.approx(width, rel=1e-9) for t in found)
    # Alone it is the paired t-test.
    (alone,) = comparisons.pooled_t_tests([d[0]])
    assert alone.p == pytest.approx(stats.ttest_1samp(d[0], 0.0).pvalue, rel=1e-9)
    assert not alone.pooled


def test_the_degrees_of_freedom_are_those_of_the_pooled_variance():
    """A variance with f degrees of freedom has the variance 2 / f, relative to its square."""
    y = np.random.default_rng(0).normal(size=(40_000, 6, 5))
    pooled = (y[:, 1:] - y[:, :1]).var(axis=2, ddof=1).mean(axis=1)
    freedom = 2 / (pooled.var() / pooled.mean() ** 2)
    assert comparisons._pool(np.ones((5, 5)).tolist())[1] == 5 * 4 / 2
    assert freedom == pytest.approx(10, rel=0.03)


def test_a_noisy_comparison_is_tested_by_its_own_variance():
    rng = np.random.default_rng(1)
    d = [*rng.normal(0.0, 1.0, (4, 5)).tolist(), rng.normal(0.0, 20.0, 5).tolist()]
    found = comparisons.pooled_t_tests(d)
    assert [t.pooled for t in found] == [True] * 4 + [False]
    assert found[-1].p == pytest.approx(comparisons.paired_t_test(d[-1]), rel=1e-12)


def test_entries_that_do_nothing_leave_the_variance_of_others_alone():
    d = np.random.default_rng(2).normal(1.0, 1.0, (2, 5)).tolist()
    zero = [0.0] * 5
    found = comparisons.pooled_t_tests([d[0], zero, d[1], d[1], zero])
    expected = comparisons.pooled_t_tests(d)
    assert found[0] == expected[0] and found[2] == found[3] == expected[1]
    assert found[1].p == found[4].p == 1.0 and found[1].interval == 0.0


def test_corrected_tests_keep_their_level_and_see_what_is_there():
    """In little; `python tests/simulate_comparisons.py` is the whole."""
    six = simulate_comparisons.SCENARIOS["six entries"]
    (wrong, _), _ = simulate_comparisons.simulate(six, 40)
    assert wrong <= 7
    _, (seen, seen_by_own) = simulate_comparisons.simulate(six, 40, difference=2.0)
    assert seen >= 80 and seen > seen_by_own


# --- which entries are compared -------------------------------------------------------------------


def grid(*entries, stage="finetuned", data="digits"):
    """Records of entries, two seeds each, with K in their names; mha has all 8 heads."""
    heads = [int(next(iter(re.findall(r"K=(\d)", name)), 8)) for name in entries]
    return [
        {
            "entry": name, "seed": seed, "stage": stage, "top1": 50.0 + i * (seed + 1),
            "num_heads": 8, "num_kv_heads": kv, "config": {"data": {"name": data}},
        }
        for i, (name, kv) in enumerate(zip(entries, heads, strict=True))
        for seed in (0, 1)
    ]  # fmt: skip


def against(records, *baselines, stage="finetuned"):
    return {(c.entry, c.other) for c in comparisons.compare(records, stage, baselines)}


def test_baselines_have_the_same_kv_heads_and_options():
    records = grid(
        "mha", "gqa, K=2", "gqa, K=4", "kdgqa, K=2", "kdgqa, K=4",
        "dgqa_ema, K=2, window=100", "gqa (svd), K=2", "kdgqa (svd), K=2",
    )  # fmt: skip
    by_gqa = {
        ("kdgqa, K=2", "gqa, K=2"),
        ("kdgqa, K=4", "gqa, K=4"),
        ("dgqa_ema, K=2, window=100", "gqa, K=2"),
        ("gqa (svd), K=2", "gqa, K=2"),
        ("kdgqa (svd), K=2", "gqa (svd), K=2"),
    }
    assert against(records) == against(records, "gqa") == by_gqa
    grouped = {r["entry"] for r in records if r["entry"] != "mha"}
    assert against(records, "mha") == {(entry, "mha") for entry in grouped}
    assert against(records, "gqa", "mha") == by_gqa | against(records, "mha")


def test_a_family_is_a_stage_and_a_data_set():
    records = grid("gqa, K=2", "kdgqa, K=2", "pgqa, K=2")
    other = grid("gqa, K=2, name=b", "kdgqa, K=2, name=b", data="b")
    alone = comparisons.compare(other, "finetuned")
    together = comparisons.compare([*records, *other], "finetuned")
    assert [c.data for c in together] == ["digits", "digits", "b"]
    assert together[-1] == alone[0]


def test_a_stage_that_several_entries_share_is_compared_once():
    longer = [f"{e}, K=2, epochs={n}" for e in ("gqa", "kdgqa") for n in (1, 5)]
    records = [*grid(*longer, stage="converted"), *grid(*longer, stage="uptrained")]
    for r in records:
        r["folder"] = r["entry"].partition(", e")[0] if r["stage"] == "converted" else r["entry"]
    assert against(records, stage="converted") == {("kdgqa, K=2, epochs=1", "gqa, K=2, epochs=1")}
    assert against(records, stage="uptrained") == {
        (f"kdgqa, K=2, epochs={n}", f"gqa, K=2, epochs={n}") for n in (1, 5)
    }


def test_what_is_said_and_written(tmp_path):
    top1 = [
        [80.0, 81.0, 82.0, 79.0, 80.0],
        [85.0, 86.2, 87.1, 84.1, 84.9],
        [80.5, 80.6, 82, 80, 79],
    ]
    found = comparisons.compare(study(top1), "finetuned")
    above, none = (c.sentence() for c in found)
    assert above.startswith("finetuned: kdgqa is above gqa (+5.06 points, 95 % interval +4.")
    assert none.startswith("finetuned: no difference seen between dgqa_ema and gqa (+0.02 points")
    (tmp_path / "c.csv").write_text(tables.comparisons_csv(found))
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [row["entry"] for row in rows] == ["kdgqa", "dgqa_ema"]
    assert float(rows[0]["p_holm"]) == found[0].p_holm
    table = tables.compared(found)
    assert r"dgqa\_ema & gqa & finetuned & 5 & +0.02 $\pm$" in table.latex()
    assert table.latex().count(r"\\") == 3
    assert sum(line.startswith("| kdgqa") for line in table.markdown()) == 1
