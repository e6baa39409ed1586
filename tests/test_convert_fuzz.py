"""A share of `fuzz_checkpoints.py`: no mutation of a checkpoint gives other numbers in silence."""

import fuzz_checkpoints
import numpy as np
import pytest
from checkpoint_cases import Case
from checkpoint_mutations import MUTATIONS

from kdgqa_jax import convert


def test_a_share_of_the_mutated_checkpoints():
    """Each mutation once, and as many that leave the numbers as they are."""
    reported = []
    tally, kinds = fuzz_checkpoints.run(2 * len(MUTATIONS), seed=1, show=reported.append)
    assert not reported
    assert tally["loaded right"] + tally["refused"] == 2 * len(MUTATIONS)
    assert tally["loaded right"] > len(MUTATIONS) and len(kinds) >= 8


@pytest.mark.slow
def test_more_mutated_checkpoints():
    reported = []
    fuzz_checkpoints.run(300, seed=2, show=reported.append)
    assert not reported


def test_other_numbers_would_be_seen(tmp_path):
    """The judge can fail: of weights that are not those that were drawn, and of other heads."""
    case = Case(np.random.default_rng(0), tmp_path, kind=("released",), format=("safetensors",))
    case.write()
    assert fuzz_checkpoints.judge(case, "sound")[0] == "loaded right"
    assert fuzz_checkpoints.judge(case, "refused")[0] == "silently wrong"
    case.weights["norm/bias"] = case.weights["norm/bias"] + np.float32(1e-6)
    assert case.wrong(convert.load(case.path, **case.options)) == "norm/bias"
    case.path.write_bytes(b"")
    assert fuzz_checkpoints.judge(case, "sound")[0] == "unduly refused"
