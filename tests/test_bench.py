"""Benchmarks run and tell what they promise; their numbers are not tested."""

import pytest

from kdgqa_jax import bench, bench_data, cli


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
def test_bad_requests_are_told(capsys, arguments, says):
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
    ],
)
def test_bad_training_steps_are_told(capsys, arguments, says):
    assert cli.main(["bench", "train", "--model=mu/16", "--steps=0", *arguments]) == 1
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1


def test_a_conversion_that_fails_is_one_sentence(capfd):
    assert cli.main(["bench", "convert", "--model=mu/16", "--pooling=svf"]) == 1
    shown = capfd.readouterr().err
    assert "failed (kdgqa convert: unknown pooling 'svf'" in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_conversion_is_measured(capsys):
    result = bench.bench_convert("Ti/16", "svd", calibration_images=2)
    out = " ".join(capsys.readouterr().out.split())  # the title may be wrapped
    assert "--pooling svd, 2 calibration images" in out
    assert result["peak_bytes"] > result["file_bytes"] > 20e6 and result["seconds"] > 0
