"""Statistics of a study: against scipy and closed forms, and by simulation of many studies."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from kdgqa_jax import comparisons, report

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


def rejections(difference, studies=1000, seeds=5):
    """Of simulated studies of all entries: how many say that anything, and each, is different."""
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(studies):
        top1 = rng.normal(80.0, 3.0, seeds) + rng.normal(0.0, 1.0, (len(ENTRIES), seeds))
        top1[1:] = top1[0] + rng.normal(difference, 1.0, (len(ENTRIES) - 1, seeds))
        found = comparisons.compare(study(top1), "finetuned")
        seen.append([c.significant for c in found])
    return np.any(seen, axis=1).mean(), np.mean(seen)


def test_corrected_tests_keep_their_level_and_see_what_is_there(monkeypatch):
    monkeypatch.setattr(comparisons, "MOST_FLIPS", 1)  # they are not asked for here
    monkeypatch.setattr(comparisons, "permutation_test", lambda differences: 1.0)
    wrongly, _ = rejections(0.0)
    assert wrongly <= 0.07
    rightly, each = rejections(2.0)  # in standard deviations of a difference
    assert rightly >= 0.8 and each >= 0.7


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
    comparisons.write(found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "comparisons.csv").read_text().splitlines()))
    assert [row["entry"] for row in rows] == ["kdgqa", "dgqa_ema"]
    assert float(rows[0]["p_holm"]) == found[0].p_holm
    latex = (tmp_path / "comparisons.tex").read_text()
    assert r"dgqa\_ema & gqa & finetuned & 5 & +0.02 $\pm$" in latex
    assert latex.count(r"\\") == 3
    lines = report._paired_lines(found)
    assert f"- {above}" in lines and sum(line.startswith("| kdgqa") for line in lines) == 1
    assert report._paired_lines([]) == []
