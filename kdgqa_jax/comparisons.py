"""Which entry of a study is better, with its uncertainty: intervals, paired tests, correction.

Seeds pair the runs of two entries: they share data order, pretrained model and everything else that
a seed decides, so that differences by seed vary less than the runs themselves.
"""

import csv
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdgqa_jax import workdir

LEVEL = 0.05
"""Of significance; intervals are of 1 - LEVEL."""

MOST_FLIPS = 2**14
"""Sign flips of a permutation test that are all tried; of more, as many are drawn."""

Record = dict[str, Any]


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % confidence interval (Student's t); None for one value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    from scipy import stats

    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * spread)


def paired_t_test(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t-test; 1 where all differences are zero, 0 where they are equal.

    Raises ValueError for fewer than two differences.
    """
    if len(differences) < 2:
        raise ValueError(f"a paired test needs at least two pairs, got {len(differences)}")
    if np.ptp(differences) == 0:
        return float(differences[0] == 0)
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def permutation_test(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: how many sign flips give as large a mean.

    Exact where there are at most `MOST_FLIPS` of them. With n pairs it is never below 2 / 2**n.
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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Top-1 of an entry less that of another on the same seeds, after one stage.

    Attributes:
      entry: the one.
      other: the other one.
      stage: after which both were evaluated.
      pairs: how many seeds both have.
      difference: mean, in points.
      interval: half-width of its 95 % confidence interval.
      p_t: of the paired t-test.
      p_holm: the same, corrected for all comparisons of the stage.
      p_permutation: of the paired permutation test, not corrected.
      effect: difference over its standard deviation (Cohen's d of pairs); infinite where that is 0.
    """

    entry: str
    other: str
    stage: str
    pairs: int
    difference: float
    interval: float
    p_t: float
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


def paired_differences(records: list[Record], entry: str, other: str, stage: str) -> list[float]:
    """Top-1 of `entry` less that of `other` by seed, in points; of the seeds that both have."""
    by_seed = {(r["entry"], r["seed"]): r["top1"] for r in records if r["stage"] == stage}
    seeds = dict.fromkeys(seed for _, seed in by_seed)
    return [
        by_seed[entry, seed] - by_seed[other, seed]
        for seed in seeds
        if {(entry, seed), (other, seed)} <= by_seed.keys()
    ]


def compare(records: list[Record], stage: str) -> list[Comparison]:
    """Every entry with grouped heads against the first one of them, which is `gqa` by default.

    Args:
      records: of results.json.
      stage: "converted", "uptrained" and so on.

    Returns:
      One comparison for each further entry; [] with fewer than two seeds.
    """
    grouped = [r["entry"] for r in records if r["num_kv_heads"] < r["num_heads"]]
    first, *others = dict.fromkeys(grouped) or [""]
    pairs = {entry: paired_differences(records, entry, first, stage) for entry in others}
    pairs = {entry: differences for entry, differences in pairs.items() if len(differences) > 1}
    tested = [paired_t_test(differences) for differences in pairs.values()]
    found = []
    for (entry, differences), p, corrected in zip(pairs.items(), tested, holm(tested), strict=True):
        mean, interval = mean_and_interval(differences)
        spread = float(np.std(differences, ddof=1))
        effect = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
        seen = (mean, interval, p, corrected, permutation_test(differences), effect)
        found.append(Comparison(entry, first, stage, len(differences), *seen))
    return found


# --- as files -------------------------------------------------------------------------------------


_COLUMNS = {
    "variant": lambda c: c.entry,
    "against": lambda c: c.other,
    "stage": lambda c: c.stage,
    "seeds": lambda c: str(c.pairs),
    "difference": lambda c: f"{c.difference:+.2f} ± {c.interval:.2f}",
    "p (Holm)": lambda c: f"{c.p_holm:.2g}",
    "p (permutation)": lambda c: f"{c.p_permutation:.2g}",
    "effect": lambda c: f"{c.effect:.2f}",
}
"""Of the tables: header and cell."""


def table(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of text."""
    return list(_COLUMNS), [[cell(c) for cell in _COLUMNS.values()] for c in comparisons]


def write(comparisons: Sequence[Comparison], folder: pathlib.Path) -> None:
    """Write comparisons.csv, with all figures unrounded, and comparisons.tex, a LaTeX table."""
    fields = [field.name for field in dataclasses.fields(Comparison)]
    with workdir.written_file(folder / "comparisons.csv") as path, path.open("w") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(c) for c in comparisons)
    header, rows = table(comparisons)
    lines = [r"\begin{tabular}{lllrrrrr}", r"\toprule", _latex(header), r"\midrule"]
    lines += [*map(_latex, rows), r"\bottomrule", r"\end{tabular}", ""]
    with workdir.written_file(folder / "comparisons.tex") as path:
        path.write_text("\n".join(lines), "utf-8")


def _latex(cells: Sequence[str]) -> str:
    escapes = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "±": r"$\pm$"})
    return " & ".join(cell.translate(escapes) for cell in cells) + r" \\"
