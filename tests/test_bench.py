"""Benchmarks run and print what they promise; their numbers are not tested."""

import collections
import json

import jax
import numpy as np
import pytest

from kdgqa_jax import cli, vit
from kdgqa_jax.bench import conversion, peer, steps, traces
from kdgqa_jax.bench import data as bench_data
from kdgqa_jax.errors import UserError

TINY = ["--model=mu/4", "--batch-size=4", "--dtype=float32", "--config.model.image_size=8"]


def figures(path):
    return {row["name"]: row for row in json.loads(path.read_text())["results"]}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "eval"])
def test_steps_take_turns_with_pytorch(capsys, tmp_path, what):
    flags = ["--rounds=2", "--variants=mha,gqa", "--peer=torch", f"--json={tmp_path / 'a.json'}"]
    assert cli.main(["bench", what, *TINY, *flags, f"--profile={tmp_path / 'trace'}"]) == 0
    rows = figures(tmp_path / "a.json")
    peer, mha, gqa = rows.values()
    assert [peer["name"].split()[0], mha["name"], gqa["name"]] == ["torch", "mha", "gqa"]
    assert all(row["seconds"] > 0 and row["rate"] > 0 for row in rows.values())
    assert all(len(row["rounds"]) == 2 for row in rows.values())
    assert gqa["argument_bytes"] < mha["argument_bytes"] and gqa["temporary_bytes"] > 0
    assert all(next((tmp_path / "trace" / name).rglob("*.xplane.pb")) for name in ("mha", "gqa"))
    for row in rows.values():
        assert {"linear layers", "attention", "activation", "norms"} <= row["parts"].keys()
        assert all(seconds > 0 for seconds in row["parts"].values())
        assert ("optimizer" in row["parts"]) == (what == "train")
    shown = capsys.readouterr().out
    assert f"{what} step: mu/4, batch 4, float32" in shown and "1.000" in shown
    assert "seconds of one step by kind of operation" in shown


def test_where_operations_run_at_once_time_is_shared():
    """Of a trace as the profiler writes it: two threads, and an event around others."""
    event = collections.namedtuple("event", "start_ns duration_ns name")
    outer, inner = event(0, 10, "run"), event(2, 3, "dot.1")
    assert list(traces._exclusive([inner, outer])) == [
        (0, 2, "run"),
        (2, 5, "dot.1"),
        (5, 10, "run"),
    ]
    assert list(traces._exclusive([])) == []
    kinds = {"a": "norms", "b": "attention", "dot": "linear layers"}
    spans = [(0, 4, "a"), (2, 6, "b"), (6, 7, "dot"), (9, 10, "a")]
    assert traces._shared(spans, kinds, {"dot"}) == {
        "norms": 4.0,
        "attention": 3.0,
        "linear layers": 3.0,
    }


def test_the_newest_trace_counts_and_one_without_operations_is_said(tmp_path, capsys):
    """A second trace in a folder does not add to the first one."""
    function = jax.jit(lambda x: (x @ x).sum()).lower(np.ones((64, 64), np.float32)).compile()
    seconds = []
    for _ in range(2):
        with jax.profiler.trace(tmp_path):
            jax.block_until_ready(function(np.ones((64, 64), np.float32)))
        newest = max(tmp_path.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime_ns)
        seconds.append(sum(traces.read(tmp_path, function.as_text()).values()))
        alone = sum(traces.read(newest.parent, function.as_text()).values())
        assert seconds[-1] == alone > 0
    assert traces.read(tmp_path, "") == {}
    steps._print_parts([{"name": "gqa", "parts": {}}])
    assert "there is no table of them" in capsys.readouterr().out


def test_a_bad_directory_for_traces_is_refused_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = ["bench", "train", *TINY, f"--profile={tmp_path / 'file' / 'x'}"]
    assert cli.main(command) == 1
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    assert cli.main(["bench", "train", *TINY, f"--profile={tmp_path}", "--rounds=0"]) == 1
    assert "--profile needs steps that run" in capsys.readouterr().err
    assert cli.main(["bench", "train", *TINY, "--profile=gs://bucket/x"]) == 1
    assert "--profile 'gs://bucket/x' is not on the local file" in capsys.readouterr().err


def test_steps_can_be_compiled_alone(capsys, tmp_path):
    flags = ["--rounds=0", "--variants=gqa", f"--json={tmp_path / 'a.json'}"]
    assert cli.main(["bench", "train", *TINY, *flags]) == 0
    (row,) = figures(tmp_path / "a.json").values()
    assert row["temporary_bytes"] > 0 and "seconds" not in row
    assert "step s" not in capsys.readouterr().out


def test_model_flops_are_those_of_the_matrix_products():
    """4.6 GFLOPs (multiply-adds) are what the literature gives for S/16 at 224 pixels."""
    model = vit.create("S/16", attention="mha")
    assert steps.model_flops(model, 1, training=False) / 2 == pytest.approx(4.6e9, rel=0.01)
    assert steps.model_flops(model, 8, True) == 24 * steps.model_flops(model, 1, False)
    grouped = vit.create("S/16", attention="gqa", num_kv_heads=3)
    saved = steps.model_flops(model, 1, False) - steps.model_flops(grouped, 1, False)
    assert saved == 12 * 2 * 197 * 384 * 64 * 2 * 3


def test_data_stages_side_by_side(capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "ROUNDS", 1)
    config = bench_data.bench_config("digits", "", batch_size=16, workers=0)
    results = bench_data.bench_data(config, image_size=16, images=64)
    assert [r["stage"] for r in results] == [
        "read and decode",
        "read, decode and resize: plain loop",
        "host pipeline, 0 workers",
        "transfer",
        "augment on the device",
    ]
    assert all(r["rate"] > 0 for r in results) and results[1]["ratio"] == 1.0
    assert results[-1]["compilations"] == 1  # for every batch
    assert "8x8x1 from the host, to 16 px" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--images", "0"], "--images: '0' must be a whole number, at least 1"),
        (["--batch-size", "0"], "--batch-size: '0' must be a whole number, at least 1"),
        (["--workers", "-1"], "--workers: '-1' must be a whole number, at least 0"),
    ],
)
def test_bad_requests_are_refused(capsys, arguments, says):
    assert cli.main(["bench", "data", *arguments]) in (1, 2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.optim.learning_rate=nan"], "optim.learning_rate=nan must be a finite number"),
        (["--config.batch_size=0"], "batch_size=0 must be a positive multiple"),
        (["--batch-size=2147483647"], "batch_size=2147483647 images of 224x224x3 take"),
        (["--dtype=float33"], "dtype='float33' must be"),
        (["--variants=gqa,nope"], "unknown attention variant 'nope'"),
        (["--json=a.csv"], "--json a.csv: results are JSON"),
    ],
)
def test_bad_training_steps_are_refused(capsys, arguments, says):
    assert cli.main(["bench", "train", "--model=mu/16", "--rounds=0", *arguments]) == 1
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_a_conversion_that_fails_is_one_sentence(capfd):
    assert cli.main(["bench", "convert", "--model=mu/16", "--pooling=svf"]) == 1
    shown = capfd.readouterr().err
    assert "failed (kdgqa convert: unknown pooling 'svf'" in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_conversion_is_measured(capsys):
    result = conversion.bench_convert("Ti/16", "svd", calibration_images=2)
    out = " ".join(capsys.readouterr().out.split())  # the title may be wrapped
    assert "--pooling svd, 2 calibration images" in out
    assert result["peak_bytes"] > result["file_bytes"] > 20e6 and result["seconds"] > 0


def test_a_step_of_pytorch_that_fails_is_one_sentence():
    says = r"step of PyTorch failed \(KeyError: 'seed'\); it needs"
    with pytest.raises(UserError, match=says), peer.started({}):
        pass
