"""Which entry of a study is better, with its uncertainty: intervals, paired tests, correction.

Seeds pair the runs of two entries: they share data order, pretrained model and everything else that
a seed decides, so that differences by seed vary less than the runs themselves. docs/analysis.md
says how the tests were chosen, and what simulated studies came to.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from kdgqa_jax.records import Record, Results, Row, data_of

LEVEL = 0.05
"""Of significance; intervals are of 1 - LEVEL."""

MOST_FLIPS = 2**14
"""Sign flips of a permutation test that are all tried; of more, as many are drawn."""

# --- tests ----------------------------------------------------------------------------------------


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % confidence interval (Student's t); None for one value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), _quantile_of_t(len(values) - 1) * float(spread)


def _quantile_of_t(freedom: float) -> float:
    """What a t statistic exceeds, in magnitude, with the probability `LEVEL`."""
    from scipy import special

    return float(special.stdtrit(freedom, 1 - LEVEL / 2))


def _p_of_t(mean: float, variance: float, count: int, freedom: float) -> float:
    """Two-sided p of a mean of `count` values; 1 for no difference, 0 for one that never varies."""
    if variance == 0:
        return float(mean == 0)
    from scipy import special

    return float(2 * special.stdtr(freedom, -abs(mean) / math.sqrt(variance / count)))


def _check_pairs(differences: Sequence[float]) -> None:
    if len(differences) < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {len(differences)}")


def paired_t_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test; 1 where all differences are zero, 0 where they are equal.

    Raises ValueError for fewer than two differences.
    """
    _check_pairs(differences)
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    count = len(differences)
    return _p_of_t(np.mean(differences), np.var(differences, ddof=1), count, count - 1)


@dataclasses.dataclass(frozen=True)
class Tested:
    """A mean difference, tested.

    Attributes:
      p: two-sided, not corrected.
      interval: half-width of the 95 % confidence interval.
      pooled: the variance is that of all comparisons; else that of its own differences.
    """

    p: float
    interval: float
    pooled: bool


def pooled_t_tests(differences: Sequence[Sequence[float]]) -> list[Tested]:
    """Paired t-tests of entries against one baseline, with one variance for all of them.

    Five seeds estimate a variance badly; those of several comparisons together estimate it better.
    The common variance is the mean of theirs, weighted by degrees of freedom. As the runs of the
    baseline are in all of them, differences of equal variance are correlated by 1/2 and their
    variances by 1/4, which leaves m (n - 1) / (1 + (m - 1) / 4) degrees of freedom for m
    comparisons over n seeds (Satterthwaite, Biometrics Bulletin 2, 1946).

    A comparison whose own variance is clearly larger than that of the others (F-test at `LEVEL`) is
    tested with its own, as the paired t-test does; so is one that stands alone. Entries that never
    differ from the baseline (a conversion that changes nothing) say nothing about the variance of
    others, and entries with the same differences count once.

    Args:
      differences: by comparison, those of its pairs, in any unit; over seeds that may be missing in
        one or the other.

    Raises ValueError for fewer than two differences.
    """
    from scipy import special

    for pairs in differences:
        _check_pairs(pairs)
    telling = list(dict.fromkeys(tuple(pairs) for pairs in differences if any(pairs)))
    found = []
    for pairs in differences:
        mean, count = float(np.mean(pairs)), len(pairs)
        variance, freedom = _pool([pairs])
        others = [other for other in telling if other != tuple(pairs)]
        pooled = bool(others) and any(pairs)
        if pooled:
            theirs, their_freedom = _pool(others)
            largest = theirs * special.fdtri(freedom, their_freedom, 1 - LEVEL)
            pooled = variance <= largest
        if pooled:
            variance, freedom = _pool(telling)
        width = _quantile_of_t(freedom) * math.sqrt(variance / count)
        found.append(Tested(_p_of_t(mean, variance, count, freedom), width, pooled))
    return found


def _pool(differences: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Common variance of differences from one baseline, and its degrees of freedom."""
    variances = [float(np.var(d, ddof=1)) if np.ptp(d) else 0.0 for d in differences]
    freedoms = [len(d) - 1 for d in differences]
    shared = sum(min(pair) for pair in itertools.permutations(freedoms, 2))
    total = sum(freedoms)
    return float(np.average(variances, weights=freedoms)), total**2 / (total + shared / 4)


def permutation_test(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: how many sign flips give as large a mean.

    Exact where there are at most `MOST_FLIPS` of them. With n pairs it is never below 2 / 2**n:
    five pairs never reach 0.05.
    """
    values = np.asarray(differences, np.float64)
    if 2 ** len(values) <= MOST_FLIPS:
        signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    else:
        drawn = np.random.default_rng(seed).choice((1, -1), (MOST_FLIPS - 1, len(values)))
        signs = np.concatenate([np.ones((1, len(values))), drawn])  # what was seen counts
    means = np.abs(signs @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-12)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979): adjusted p."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def effect_size(differences: Sequence[float]) -> float:
    """The mean over its standard deviation (Cohen's d of pairs); infinite where that is zero."""
    if np.ptp(differences) == 0:
        return math.copysign(math.inf, differences[0]) if differences[0] else 0.0
    return float(np.mean(differences) / np.std(differences, ddof=1))


# --- comparisons of a study -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Top-1 of an entry less that of another on the same seeds, after one stage.

    Attributes:
      entry: the one.
      other: the other one, the baseline.
      stage: after which both were evaluated.
      data: the data set; "" where the records do not say.
      pairs: how many seeds both have.
      difference: mean, in points.
      deviation: standard deviation of the differences.
      interval: half-width of the 95 % confidence interval of the mean.
      p_t: of the paired t-test by these differences alone, not corrected.
      p_pooled: of `pooled_t_tests` over all entries that are compared with the baseline.
      pooled: p_pooled and interval are by the common variance.
      p_holm: p_pooled corrected for all comparisons of the stage and the data set.
      p_permutation: of the paired permutation test, not corrected.
      effect: difference over its standard deviation.
    """

    entry: str
    other: str
    stage: str
    data: str
    pairs: int
    difference: float
    deviation: float
    interval: float
    p_t: float
    p_pooled: float
    pooled: bool
    p_holm: float
    p_permutation: float
    effect: float

    @property
    def significant(self) -> bool:
        """A difference was seen, at `LEVEL`."""
        return self.p_holm < LEVEL

    def sentence(self) -> str:
        """What was seen, in words."""
        low, high = self.difference - self.interval, self.difference + self.interval
        figures = (
            f"{self.difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, p ="
            f" {self.p_holm:.2g} after Holm's correction, {self.pairs} seeds"
        )
        seen = f"no difference seen between {self.entry} and {self.other}"
        if self.significant:
            seen = f"{self.entry} is {'above' if self.difference > 0 else 'below'} {self.other}"
        return f"{self.stage}: {seen} ({figures})."


def paired_differences(results: Results, row: Row, other: Row, stage: str) -> list[float]:
    """Top-1 of `row` less that of `other` by seed, in points; of the seeds that both have."""
    a, b = results.of(row, stage), results.of(other, stage)
    return [a[seed]["top1"] - b[seed]["top1"] for seed in sorted(a.keys() & b.keys())]


def default_baseline(results: Results) -> str:
    """`gqa`, or else the first entry with grouped heads, without settings; "" for none."""
    grouped = []
    for row in results.rows:
        record = next(iter(results.last(row).values()))
        if record["num_kv_heads"] < record["num_heads"]:
            grouped.append(row)
    grouped.sort(key=lambda row: (row.variant != "gqa", row.variant == "gqa" and row.rule != ""))
    return dataclasses.replace(grouped[0], settings=()).name if grouped else ""


def baseline_of(row: Row, baseline: Row, rows: Sequence[Row]) -> Row | None:
    """The row that `row` is compared with: of the baseline's variant, with no setting that `row`
    lacks (so of the same K and size) and with most of those it has.

    One of the same rule of conversion counts first, then one of the baseline's. None: there is
    none.
    """
    able = [r for r in rows if r.variant == baseline.variant and r != row and r.within(row)]
    able.sort(key=lambda r: len(r.settings), reverse=True)
    for rule in dict.fromkeys((row.rule, baseline.rule)):
        for candidate in able:
            if candidate.rule == rule:
                return candidate
    return None


def compare(
    records: Sequence[Record], stage: str, baselines: Sequence[str] = ()
) -> list[Comparison]:
    """Every entry with grouped heads against the baseline of the same K, size and options.

    Args:
      records: of results.json.
      stage: "converted", "uptrained" and so on.
      baselines: names of entries without settings, such as "mha" and "gqa"; none:
        `default_baseline`.

    Returns:
      The comparisons, by data set and baseline; a pair with fewer than two seeds in common is left
      out. All comparisons of one data set are corrected for together.
    """
    results = Results(records)
    rows = results.rows_at(stage)
    pairs: dict[str, dict[tuple[str, Row], dict[Row, list[float]]]] = {}
    for name in baselines or [default_baseline(results)]:
        for row in rows:
            record = next(iter(results.of(row, stage).values()))
            alike = [r for r in rows if _data(results, r, stage) == data_of(record)]
            other = baseline_of(row, Row.parse(name), alike)
            if other is None or record["num_kv_heads"] >= record["num_heads"]:
                continue
            differences = paired_differences(results, row, other, stage)
            if len(differences) > 1:
                families = pairs.setdefault(data_of(record), {})
                families.setdefault((name, other), {})[row] = differences
    return [c for data, family in pairs.items() for c in _compared(stage, data, family)]


def _data(results: Results, row: Row, stage: str) -> str:
    return data_of(next(iter(results.of(row, stage).values())))


def _compared(
    stage: str, data: str, family: dict[tuple[str, Row], dict[Row, list[float]]]
) -> list[Comparison]:
    """The comparisons of one stage and data set: those with one baseline share a variance."""
    tested = [t for rows in family.values() for t in pooled_t_tests([*rows.values()])]
    corrected = iter(zip(tested, holm([t.p for t in tested]), strict=True))
    found = []
    for (_, other), rows in family.items():
        for row, differences in rows.items():
            test, p_holm = next(corrected)
            found.append(
                Comparison(
                    row.name,
                    other.name,
                    stage,
                    data,
                    len(differences),
                    float(np.mean(differences)),
                    float(np.std(differences, ddof=1)),
                    test.interval,
                    paired_t_test(differences),
                    test.p,
                    test.pooled,
                    p_holm,
                    permutation_test(differences),
                    effect_size(differences),
                )
            )
    return found
