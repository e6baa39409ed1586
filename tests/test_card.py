"""Model cards: what they say is in the records, and in nothing else."""

import json

import helpers
import pytest
from huggingface_hub import ModelCard

from kdgqa_jax import card, checkpoint, cli, convert, vit

FIGURES = {"top1": 93.25, "top5": 99.5, "loss": 0.25, "count": 360}


@pytest.fixture
def run(tmp_path):
    """A run's directory: its model, and its result."""
    model = helpers.tiny_vit("kdgqa")
    description = {
        "model": {"name": "custom", **vit.arguments(model)},
        "channels": 1,
        "class_names": list("abcde"),
        "preprocessing": {"mean": [0.5], "std": [0.5]},
        "trained_on": {
            "data": {"name": "digits", "shift": "negative"},
            "steps": 1200,
            "init": "vit_base",
        },
        "versions": {"jax": "0.10.2"},
    }
    path = tmp_path / "run"
    checkpoint.save_model(path / "model", helpers.vit_variables(model), description)
    (path / "result.json").write_text(json.dumps(FIGURES))
    return path


def test_a_card_holds_what_the_records_say(run, tmp_path, capsys):
    evaluated = {"dataset": "mnist", "split": "train", "shift": "none", **FIGURES, "top1": 12.5}
    (tmp_path / "mnist.json").write_text(json.dumps(evaluated))
    command = ["card", "--checkpoint", str(run / "model"), "--license", "apache-2.0"]
    assert cli.main([*command, "--results", str(tmp_path / "mnist.json")]) == 0
    assert capsys.readouterr().out.strip() == f"written: {run / 'model' / 'README.md'}"
    found = ModelCard.load(run / "model" / "README.md")
    assert found.data.license == "apache-2.0" and found.data.datasets == ["digits"]
    assert found.data.model_name == "run" and "kdgqa" in found.data.tags
    results = {(r.dataset_name, r.metric_name): r.metric_value for r in found.data.eval_results}
    assert results == {
        ("digits (negative)", "top-1, %"): 93.25,
        ("digits (negative)", "top-5, %"): 99.5,
        ("digits (negative)", "loss, nats"): 0.25,
        ("mnist", "top-1, %"): 12.5,
        ("mnist", "top-5, %"): 99.5,
        ("mnist", "loss, nats"): 0.25,
    }
    for text in (
        "| key/value heads | 3 |",
        "Training started from `vit_base`.",
        "digits, shifted by negative; 1,200 updates.",
        "| mnist | train | 12.5 | 99.5 | 0.25 |",
        'checkpoint.load_model("model")',
        "jax 0.10.2",
    ):
        assert text in found.text
    checkpoint.load_model(run / "model")  # the card is no damage


def test_a_card_of_a_converted_model_names_source_and_rule(run, tmp_path):
    convert.load(run / "model", attention="gqa", num_kv_heads=1, pooling="first").save(
        tmp_path / "converted"
    )
    text = str(card.model_card(tmp_path / "converted"))
    assert f"Converted from `{run / 'model'}`" in text
    assert "pooled 3 to 1 heads (first)" in text
    assert "## Results" not in text  # a conversion has none


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    command = ["card", "--checkpoint", str(run / "model")]
    (tmp_path / "x.json").write_text("[1]")
    (run / "model" / "README.md").write_text("mine")
    for flags, says in (
        ([], "README.md exists already"),
        (["--out", str(tmp_path / "card.txt")], "give a name that ends in .md"),
        (["--out", str(tmp_path / "card.md"), "--results", str(tmp_path / "x.json")],
         "x.json is no record of an evaluation"),
        (["--out", str(tmp_path / "card.md"), "--checkpoint", str(tmp_path)],
         "is not a model directory"),
    ):  # fmt: skip
        assert cli.main([*command, *flags]) == 1
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    assert not list(tmp_path.glob("card*")) and (run / "model" / "README.md").read_text() == "mine"
