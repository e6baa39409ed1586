"""Simulated studies: how often comparisons are wrong, and how often they see what is there.

    python tests/simulate_comparisons.py

In each study seeds differ by much more than entries do. Without a true difference no comparison
should be significant in more than 5 % of studies (7 % is the bound); with one of two standard
deviations of the paired differences, at least 80 % of the comparisons should be. The figures in
docs/analysis.md come from here.
"""

import argparse

import numpy as np

from kdgqa_jax import comparisons

BOUND, POWER = 7.0, 80.0
"""Percent: of studies that are wrong, at most; of comparisons that see a difference, at least."""

SCENARIOS = {
    "six entries": [[1.0] * 6],
    "eleven entries": [[1.0] * 11],
    "six entries, two K": [[1.0] * 6] * 2,
    "two K, one of them noisier": [[1.0] * 6, [3.0] * 6],
    "one entry noisier": [[1.0] * 5 + [3.0]],
    "the baseline noisier": [[3.0] + [1.0] * 5],
    "all entries differ in noise": [[0.5, 0.7, 0.9, 1.1, 1.5, 2.0]],
}
"""Standard deviations of the entries over seeds, the baseline's first; a list for each K."""

MUST_SEE = ("six entries", "eleven entries")
"""Where the power is bounded, too; the last entry alone differs, or all do."""


def records(rng, deviations, seeds, difference, last_alone):
    """Of a study: top-1 of every entry and seed; differences in deviations of paired ones."""
    found = []
    for kv_heads, entries in enumerate(deviations, 1):
        seeds_differ = rng.normal(80.0, 3.0, seeds)
        for number, deviation in enumerate(entries):
            paired = np.hypot(deviation, entries[0])
            differs = number == len(entries) - 1 if last_alone else number > 0
            top1 = seeds_differ + rng.normal(0.0, deviation, seeds) + difference * paired * differs
            name = f"{'v' + str(number) if number else 'gqa'}, K={kv_heads}"
            common = {"entry": name, "stage": "finetuned", "num_heads": 8, "num_kv_heads": kv_heads}
            found += [{**common, "seed": seed, "top1": x} for seed, x in enumerate(top1)]
    return found


def simulate(deviations, studies, seeds=5, difference=0.0, last_alone=False, seed=0):
    """(share of studies with a significant comparison, share of true differences that are), in
    percent, for the test of the library and for paired t-tests with Holm's correction alone."""
    rng = np.random.default_rng(seed)
    any_seen, true_seen = [], []
    for _ in range(studies):
        found = comparisons.compare(
            records(rng, deviations, seeds, difference, last_alone), "finetuned"
        )
        assert len(found) == sum(len(entries) - 1 for entries in deviations)
        last = {f"v{len(entries) - 1}" for entries in deviations}
        true = [not last_alone or c.entry.partition(",")[0] in last for c in found]
        own = comparisons.holm([c.p_t for c in found])
        seen = np.array([[c.significant for c in found], np.array(own) < comparisons.LEVEL])
        any_seen.append(seen.any(axis=1))
        true_seen.append(seen[:, true].mean(axis=1))
    return [tuple(100 * np.mean(x, axis=0)) for x in (any_seen, true_seen)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000, help="of each kind")
    parser.add_argument("--seeds", type=int, default=5, help="of each study")
    arguments = parser.parse_args()
    size = (arguments.studies, arguments.seeds)
    print(f"{size[0]} studies of {size[1]} seeds each; in brackets: paired t-tests and Holm alone")
    print("wrong: % of studies with any comparison, no difference true; seen: % of comparisons, of")
    print("those where the last entry alone differs by two deviations, and where all entries do")
    failed = []
    for number, (name, deviations) in enumerate(SCENARIOS.items()):
        wrong = simulate(deviations, *size, seed=[number, 0])[0]
        alone = simulate(deviations, *size, 2.0, last_alone=True, seed=[number, 1])[1]
        each = simulate(deviations, *size, 2.0, seed=[number, 2])[1]
        pairs = zip(("wrong", "seen", "seen"), (wrong, alone, each), strict=True)
        print(name.ljust(30), *(f"{n} {a:5.1f} ({b:4.1f})" for n, (a, b) in pairs), flush=True)
        low = size[1] >= 5 and name in MUST_SEE and min(alone[0], each[0]) < POWER
        if wrong[0] > BOUND or low:
            failed.append(name)
    print(f"beyond the bounds: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
