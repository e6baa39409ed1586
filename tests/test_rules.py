"""A rule that the package does not know goes everywhere, and rules are asked, never named."""

import dataclasses
import json
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_study import tiny_study
from test_train import FIGURES, assert_same, final_state, interrupt, tiny_config

from kdgqa_jax import (
    allocation,
    attention,
    checkpoint,
    cli,
    convert,
    logs,
    options,
    rules,
    study,
    train,
    train_step,
    tree_utils,
    vit,
)
from kdgqa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class QueryVariance(rules.Rule):
    """By the variance of the queries of each equal group, the largest of the last updates."""

    sharpness: float = options.option(2.0)

    def memory(self, num_heads, num_kv_heads):
        return {"history": jnp.zeros((2, num_kv_heads))}

    def scores(self, query, key, memory, mask):
        variance = jnp.var(jax.lax.stop_gradient(query), axis=1).sum(-1)  # BN
        by_group = variance.reshape(key.shape[0], key.shape[2], -1).mean(-1)  # BK
        return jnp.mean(by_group, axis=0, where=None if mask is None else mask[:, None])

    def update(self, scores, memory, num_heads):
        return {"history": jnp.stack([scores, memory["history"][0]])}

    def allocate(self, scores, memory, num_heads):
        return allocation.apportion(memory["history"].max(0) ** self.sharpness, num_heads)

    def fixed_allocation(self, memory, num_heads, num_kv_heads):
        return self.allocate(None, memory, num_heads)


@pytest.fixture(scope="module", autouse=True)
def registered():
    attention.register("query_variance", QueryVariance)
    yield
    del attention.VARIANTS["query_variance"]


def settings(**changes):
    return tiny_config("query_variance", **{"model.sharpness": 8.0}, **changes)


def kdgqa(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


@pytest.mark.slow
def test_a_new_rule_is_trained_evaluated_inspected_and_converted(tmp_path, capsys):
    workdir = tmp_path / "run"
    result = train.train_and_evaluate(settings(), workdir)
    its_memory_decides(workdir, result)
    it_resumes_bit_for_bit(workdir, result, tmp_path / "again")
    capsys.readouterr()
    it_is_evaluated_and_inspected(workdir / "model", result, tmp_path, capsys)
    it_is_converted(workdir / "model", tmp_path)


def its_memory_decides(workdir, result):
    model, variables, _ = checkpoint.load_model(workdir / "model")
    assert model.attention.rule == QueryVariance(sharpness=8.0)
    history = variables["norm_stats"]["blocks"]["attn"]["history"]  # layers are stacked
    assert history.shape == (4, 2, 4) and (history > 0).all()
    scores = [r["key_norm"] for r in logs.read_metrics(workdir) if r["split"] == "train"]
    helpers.assert_close(history, np.swapaxes(scores[:-3:-1], 0, 1), 1e-6)
    expected = [helpers.naive_apportion(h.max(0) ** 8.0, 8) for h in history]
    assert result["allocation"] == expected and len(np.unique(expected, axis=0)) > 1


def it_resumes_bit_for_bit(workdir, result, again):
    interrupt(settings(), again, 8)
    resumed = train.train_and_evaluate(settings(), again)
    assert {k: resumed[k] for k in FIGURES} == {k: result[k] for k in FIGURES}
    assert_same(final_state(again), final_state(workdir))


def it_is_evaluated_and_inspected(model, result, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    kdgqa(capsys, "evaluate", "--checkpoint", model, "--dataset", "digits", "--out", figures)
    assert json.loads(figures.read_text())["top1"] == result["top1"]
    shown = kdgqa(capsys, "inspect", "--checkpoint", model)
    assert "query_variance" in shown and "history" in shown
    assert " ".join(map(str, result["allocation"][0])) in shown


def it_is_converted(model, tmp_path):
    """To a file and back, to other variants and from them, with and without fewer heads."""
    convert.export(model, tmp_path / "m.safetensors")
    back = convert.load(tmp_path / "m.safetensors")
    original, variables, _ = checkpoint.load_model(model)
    assert back.model.attention == original.attention
    assert_same(tree_utils.in_layout(back.variables, True), tree_utils.in_layout(variables, True))
    gqa = convert.load(model, attention="gqa")
    assert "norm_stats" not in gqa.variables
    gqa.save(tmp_path / "gqa")
    assert "sharpness" not in json.loads((tmp_path / "gqa/model.json").read_text())["model"]
    for kv_heads in (4, 2):
        again = convert.load(tmp_path / "gqa", attention="query_variance", num_kv_heads=kv_heads)
        memory = tree_utils.stack_layers(again.variables["norm_stats"])["blocks"]["attn"]["history"]
        np.testing.assert_array_equal(memory, np.zeros((4, 2, kv_heads)))
    with pytest.raises(UserError, match="a file of the released code cannot say"):
        convert.export(model, tmp_path / "query_variance.pth", to="released")


@pytest.mark.slow
def test_a_new_rule_in_parts_of_a_batch(registered):
    config = settings(batch_size=32)
    model = vit.create(**config.model.to_dict(), num_classes=10, depth=1)
    images, labels = helpers.images(32), np.arange(32) % 10
    batch = {"images": images, "targets": labels, "labels": labels}
    variables = jax.device_get(vit.init_variables(model, jax.random.key(0), 1))
    state = train_step.init_state(variables, config, jax.random.key(1))

    def outcome(parts):
        grads, norm_stats, metrics = parts(state, batch, helpers.rngs())
        return {"grads": grads, "memory": norm_stats, "allocation": metrics["allocation"]}

    def whole(*arguments):
        return outcome(lambda *a: train_step._gradients(model, *a))

    def four(*arguments):
        return outcome(lambda *a: train_step._accumulated(model, 4, *a))

    whole, four = helpers.fast_jit(whole)(), helpers.fast_jit(four)()
    np.testing.assert_array_equal(four["allocation"], whole["allocation"])
    helpers.assert_close(four["memory"], whole["memory"], 1e-5)
    scale = helpers.largest(whole["grads"])
    helpers.assert_close(four["grads"], whole["grads"], 1e-5, scale=scale)


@pytest.mark.slow
def test_a_new_rule_in_a_study(registered, tmp_path):
    changes = {"pretrain.epochs": 0.1, "uptrain.epochs": 0.1, "finetune.epochs": 0.0}
    study.run_study(tiny_study(variants=("query_variance",), **changes), tmp_path)
    records = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [r["variant"] for r in records] == ["mha", *2 * ["query_variance"]]
    assert records[-1]["config"]["model"]["sharpness"] == 2.0
    for plot in ("allocation", "key_norm"):
        assert (tmp_path / "report" / f"{plot}.png").stat().st_size > 10_000
    assert "| query_variance | 8 | 4 |" in (tmp_path / "report" / "results.md").read_text()


def test_names_that_are_taken_are_refused():
    with pytest.raises(ValueError, match="the attention variant 'gqa' exists already"):
        attention.register("gqa", QueryVariance)

    @dataclasses.dataclass(frozen=True)
    class Clashing(rules.Rule):
        window: str = options.option("hann")

    with pytest.raises(ValueError, match=r"option 'window' is .* in Clashing, but .* else"):
        attention.register("clashing", Clashing)
    assert "clashing" not in attention.VARIANTS


def test_options_of_a_new_rule_are_checked():
    with pytest.raises(UserError, match="model option sharpness='sharp' must be of type float"):
        vit.create("mu/4", attention="query_variance", sharpness="sharp")
    with pytest.raises(UserError, match="unknown model option 'sharpnes': did you mean 'sharpness"):
        vit.create("mu/4", attention="query_variance", sharpnes=1.0)


def test_the_rule_of_the_documentation_works():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "rules.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    del attention.VARIANTS["query_variance"]  # which it registers
    names: dict = {"__name__": "documentation"}
    try:
        exec(code.replace("S/16", "mu/4").replace("kv_heads=3", "kv_heads=4"), names)
        model = names["model"].clone(image_size=8)
        variables = vit.init_variables(model, jax.random.key(0))
        _, new = model.apply(variables, jnp.ones((2, 8, 8, 3)), train=True, mutable=["norm_stats"])
        average = new["norm_stats"]["blocks_0"]["attn"]["average"]
        assert average.shape == (4,) and (average > 0).all()
    finally:
        attention.VARIANTS["query_variance"] = attention.Variant(QueryVariance)
