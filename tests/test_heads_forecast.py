"""What a conversion discards, against loops over tokens; the sentence that predicts."""

import pathlib

import helpers
import numpy as np
import pytest
from convert_helpers import model_directory
from helpers import H, N
from merging_helpers import (
    naive_key_error,
    naive_mean_pooled,
    naive_value_errors,
    random_layer,
    structured_tokens,
)

from kdgqa_jax import convert, workdir
from kdgqa_jax.heads import forecast


def naive_shares(x, before, after):
    """Squared errors of logits and of values about their means, relative to squares."""
    widths = [layer["query"]["kernel"].shape[2] for layer in (before, after)]
    scaled = {**after, "query": {k: a * (widths[0] / widths[1]) ** 0.5
                                 for k, a in after["query"].items()}}  # fmt: skip
    silent = {**before, "query": {leaf: 0.0 * a for leaf, a in before["query"].items()}}
    errors = [naive_key_error(x, before, other).sum() for other in (scaled, silent)]
    mute = {**before, "out": {leaf: 0.0 * a for leaf, a in before["out"].items()}}
    spread = [naive_value_errors(x, before, other).var(axis=1).sum() for other in (after, mute)]
    return errors[0] / errors[1], spread[0] / spread[1]


@pytest.mark.parametrize("how", ["pooled", "merged", "narrow", "both"])
def test_shares_equal_those_of_all_tokens(how):
    before, x = random_layer(1), structured_tokens(2)
    moments = convert.InputMoments.of(x)
    after = {
        "pooled": lambda: naive_mean_pooled(before, 3),
        "merged": lambda: convert.merge_heads(before, 3, moments).attention,
        "narrow": lambda: (
            convert.merge_heads(
                before, N, convert.data_free_moments(np.ones(N * H)), head_width=5, v_head_width=3
            ).attention
        ),
        "both": lambda: convert.merge_heads(before, 2, moments, head_width=5).attention,
    }[how]()
    shares = forecast.discarded(before, after, moments)
    helpers.assert_close(np.array(shares), np.array(naive_shares(x, before, after)), 1e-6)
    assert min(shares) > 1e-3


def test_nothing_is_discarded_where_nothing_changes():
    before = random_layer(3)
    moments = convert.data_free_moments(np.ones(N * H))
    assert max(forecast.discarded(before, before, moments)) < 1e-12
    narrow = convert.merge_heads(before, 3, moments, head_width=4)
    by_rule = narrow.key_lost.sum() / narrow.key_energy.sum()
    assert forecast.discarded(before, narrow.attention, moments)[0] == pytest.approx(by_rule)


def test_reports_predict_where_it_can_be_said(tmp_path):
    source = model_directory(tmp_path / "mha", "mha")
    found = convert.load(source, attention="gqa", num_kv_heads=3, pooling="svd", head_width=5)
    assert found.report.notes[0].startswith("predicted: ")
    for options in ({}, {"attention": "kdgqa", "num_kv_heads": 3}):
        notes = convert.load(source, **options).report.notes
        assert not any(note.startswith("predicted") for note in notes)
    normed = model_directory(tmp_path / "normed", "mha", qk_norm=True)
    notes = convert.load(normed, attention="gqa", num_kv_heads=3, pooling="svd").report.notes
    assert not any(note.startswith("predicted") for note in notes)


def test_bands_are_those_of_the_front():
    """What is printed is what docs/results holds, to two decimals."""
    results = pathlib.Path(__file__).parents[1] / "docs" / "results"
    gate = workdir.read_json(results / "front_dinov2_small" / "front.json")["gate_of_all"]
    assert gate["as printed"]["conversions"] >= 50
    for how, bands in forecast.MEASURED.items():
        for band, (limit, count, *cosines) in zip(bands, gate[how]["bands"], strict=True):
            assert band == (round(limit, 3), count, *(round(x, 2) for x in cosines))


def test_sentences_promise_no_more_than_was_measured():
    for how, bands in forecast.MEASURED.items():
        below = 0.0
        for limit, count, least, largest in bands:
            share = (below + limit) / 2
            said = forecast.forecast({"blocks_0": (0.0, 2 * share)}, how == "calibrated")
            assert f"{count} conversions like this" in said
            assert f"cosines of {least:.2f} to {largest:.2f}" in said
            below = limit
        beyond = forecast.forecast({"blocks_0": (below, below + 0.1)}, how == "calibrated")
        assert "train afterwards" in beyond and "cosines" not in beyond
    assert forecast.forecast({"blocks_0": (0.0, 0.001)}, True).startswith("under 1% of logits")
