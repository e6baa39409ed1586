"""Checkpoints of every kind, sound and mutated: what `convert.load` makes of each.

    python tests/fuzz_checkpoints.py --count 2000 --seed 0

Each case is a tiny model with random weights, written by the functions here in a layout and a
format, and changed by one mutation. What should come out is known beforehand: the numbers that were
drawn (SOUND), a refusal in one sentence (REFUSED), or either but never other numbers (EITHER: of
random bytes and values, which may hit something that does not matter). The figures at the end count
what was loaded right, refused, silently wrong, unduly refused, a traceback, slow or too large.
"""

import argparse
import collections
import contextlib
import itertools
import pathlib
import sys
import tempfile
import time
import warnings

import numpy as np
from checkpoint_cases import REFUSED, SOUND, Case
from checkpoint_mutations import MUTATIONS

from kdgqa_jax import convert
from kdgqa_jax.errors import UserError

SLOW, TIMES, FLOOR = 10.0, 4, 2**26  # seconds; memory: times the size of the file, bytes at least


@contextlib.contextmanager
def measured(figures):
    """seconds, and bytes that the process grew by at its largest (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.monotonic()
    yield
    figures["seconds"] = time.monotonic() - start
    figures["bytes"] = max(status("VmHWM") - before, 0)


def status(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def judge(case, expect):
    """(verdict, explanation, figures) of one case that was written."""
    figures = {}
    try:
        with measured(figures), warnings.catch_warnings():
            warnings.simplefilter("error", category=ResourceWarning)
            converted = convert.load(case.path, **case.options)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 3000 or str(case.path) not in text:
            return "not a sentence", text[:300], figures
        return ("unduly refused" if expect == SOUND else "refused"), text, figures
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:300], figures
    wrong = case.wrong(converted)
    if wrong or expect == REFUSED:
        return "silently wrong", wrong or "should have been refused", figures
    return "loaded right", "", figures


BAD = ("silently wrong", "unduly refused", "traceback", "not a sentence", "slow", "too large")


def run(count, seed=0, show=print):
    """({verdict: number}, {kind: number}) over `count` cases.

    Every second one is a mutation that leaves the numbers as they are, the others are all of them
    in turn. `show` gets a line for each bad one.
    """
    sound = [name for name, (expect, _, _) in MUTATIONS.items() if expect == SOUND]
    order = [name for pair in zip(MUTATIONS, itertools.cycle(sound)) for name in pair]
    tally = collections.Counter(dict.fromkeys(("loaded right", "refused", *BAD), 0))
    kinds = collections.Counter()
    for i in range(count):
        expect, only, mutate = MUTATIONS[order[i % len(order)]]
        rng = np.random.default_rng([seed, i])
        with tempfile.TemporaryDirectory() as folder:
            case = Case(rng, pathlib.Path(folder), **only)
            case.expect = expect
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch and zipfile, on what is written
                mutate(case)
            size = sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file())
            verdict, why, figures = judge(case, expect)
        verdicts = [verdict]
        verdicts += ["slow"] if figures.get("seconds", 0) > SLOW else []
        too_large = i > len(order) and figures.get("bytes", 0) > max(TIMES * size, FLOOR)
        verdicts += ["too large"] if too_large else []
        tally.update(verdicts)
        kinds[f"{case.kind} ({case.format})"] += 1
        for bad in set(verdicts) & set(BAD):
            kind = f"{mutate.__name__} of {case.kind} ({case.format})"
            show(f"case {i}: {bad}: {kind}: {why} {figures}")
    return tally, kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    tally, kinds = run(arguments.count, arguments.seed)
    print(f"{arguments.count} checkpoints, seed {arguments.seed}, {time.monotonic() - start:.0f} s")
    print(", ".join(f"{name}: {number}" for name, number in sorted(kinds.items())))
    for verdict, number in tally.items():
        print(f"{verdict:15} {number}")
    return 1 if any(tally[bad] for bad in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
