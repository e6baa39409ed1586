"""What is written for PyTorch and read back is the same model bit for bit, or is not written."""

import json
import random

import helpers
import jax
import numpy as np
import pytest
import sweep_exports
import torch
from convert_helpers import dtypes, model_directory
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kdgqa_jax import checkpoint, cli, convert, vit
from kdgqa_jax.errors import UserError


def test_a_share_of_the_sweep(tmp_path):
    """`python tests/sweep_exports.py` has all of them; an option that it lacks fails here."""
    assert set(vit.arguments(helpers.tiny_vit())) <= sweep_exports.COVERED
    cases = random.Random(1).sample(sweep_exports.all_cases(every_dtype=False), 6)
    counts, wrong = sweep_exports.sweep(cases, tmp_path)
    assert wrong == []
    assert counts["safetensors: equal"] == counts["directory: equal"] == len(cases)
    assert counts["logits compared"] >= 3


def assert_same_model(path, again):
    """Model, arrays and dtypes: the same program and what it is run with."""
    (model, variables, _), after = checkpoint.load_model(path), convert.load(again)
    assert after.model == model
    jax.tree.map(np.testing.assert_array_equal, after.variables, variables)
    assert dtypes(after.variables) == dtypes(variables)


GRADIENT = {"importance": "gradient", "memory": {"key_gradient": [0.5, 3.0, 2.0]}}
MOVED = {"key_norm": [3, 2, 1], "allocation": [1, 1, 4]}
ALL_HEADS = {"key_norm": range(1, 7), "allocation": [0, 0, 3, 1, 1, 1]}


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("kdgqa", {"num_kv_heads": 3, **GRADIENT}),
        ("kdgqa", {"num_kv_heads": 6}),
        ("dgqa_ema", {"num_kv_heads": 6, "memory": ALL_HEADS}),
        ("dgqa_diff", {"num_kv_heads": 3, "memory": MOVED, "norm_epsilon": 1e-12}),
        ("pgqa", {"num_kv_heads": 6, "noise_at_eval": True, "noise_target": "output"}),
        ("mha", {"dtype": "bfloat16", "param_dtype": "bfloat16"}),
        ("gqa", {"num_kv_heads": 3, "param_dtype": "float16"}),
    ],
)
def test_safetensors_hold_everything(tmp_path, attention, options):
    path = model_directory(tmp_path / "model", attention, **options)
    convert.export(path, tmp_path / "a.safetensors")
    assert_same_model(path, tmp_path / "a.safetensors")
    description = convert.load(tmp_path / "a.safetensors").description
    assert description["class_names"][1] == "class 1"
    assert description["preprocessing"]["mean"] == 0.4
    arrays = load_file(tmp_path / "a.safetensors")
    cache = {name: arrays.pop(name) for name in list(arrays) if name.endswith("cache")}
    assert dtypes(arrays) == {options.get("param_dtype", "float32")}
    assert dtypes(cache) <= {"float32"}


def test_a_trained_multi_head_model_does_not_lose_its_heads(tmp_path):
    """Where a config leaves `num_kv_heads` open, so does model.json."""
    path = model_directory(tmp_path / "model", "mha", num_kv_heads=None)
    convert.export(path, tmp_path / "a.safetensors")
    assert_same_model(path, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("attention", "options", "says"),
    [
        ("dgqa_diff", {"memory": MOVED}, "the allocation that it remembers"),
        ("kdgqa", GRADIENT, "importance='gradient', the key_gradient that it remembers"),
        ("kdgqa", {"allocation_scope": "example"}, "allocation_scope='example'"),
        ("kdgqa", {"min_heads_per_group": 1}, "min_heads_per_group=1"),
        ("gqa", {"norm_epsilon": 1e-12}, "norm_epsilon=1e-12"),
        ("pgqa", {"noise_at_eval": True}, "noise_at_eval=True"),
        ("pgqa", {"noise_statistics": "mean_std"}, "noise_statistics='mean_std'"),
        ("gqa", {"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ("dgqa_ema", {"window": 7, "beta": 0.5}, "beta=0.5, window=7"),
        ("gqa", {"image_size": (8, 16)}, "nothing beside the weights gives the image size"),
        ("gqa", {"image_size": (4, 16)}, "image_size=(4, 16)"),
        ("gqa", {"width": 192, "image_size": 4, "num_kv_heads": 2}, "num_heads=6"),
    ],
)
def test_a_released_file_that_could_not_say_it_is_not_written(
    tmp_path, capsys, attention, options, says
):
    path = model_directory(tmp_path / "model", attention, **{"num_kv_heads": 3, **options})
    out = tmp_path / f"{attention}.pth"
    command = ["convert", "--source", str(path), "--to", "released", "--out", str(out)]
    assert cli.main(command) == 1
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("attention", "num_kv_heads", "name", "hint"),
    [
        ("kdgqa", 6, "a.pth", "a_kdgqa.pth"),
        ("kdgqa", 3, "gqa.pth", "gqa_kdgqa.pth"),
        ("dgqa_diff", 3, "ema.pth", "ema_dgqa_diff.pth"),
    ],
)
def test_a_released_file_is_named_after_its_variant(tmp_path, attention, num_kv_heads, name, hint):
    path = model_directory(tmp_path / "model", attention, num_kv_heads=num_kv_heads)
    with pytest.raises(UserError, match=f"attention='{attention}' but by its name .such as {hint}"):
        convert.export(path, tmp_path / name, "released")
    named = tmp_path / f"{attention}.pth"
    convert.export(path, named, "released")
    again = convert.load(named, num_heads=6)
    assert again.model == convert.load(path).model


def test_a_config_that_lies_beside_the_file_counts(tmp_path):
    """Its reader takes what a file does not say from there."""
    path = model_directory(tmp_path / "model", "gqa", num_kv_heads=3)
    (tmp_path / "config.json").write_text('{"layer_norm_eps": 1e-5}')
    with pytest.raises(UserError, match="cannot say norm_epsilon=1e-06"):
        convert.export(path, tmp_path / "gqa.pth", "released")
    convert.export(path, tmp_path / "gqa.safetensors")
    assert_same_model(path, tmp_path / "gqa.safetensors")


def test_options_of_other_variants_and_of_training_are_no_obstacle(tmp_path):
    """The study gives every variant the window and the dropout of its config."""
    free = {"window": 7, "noise_scale": 0.5, "dropout": 0.1, "scan_layers": True, "remat": "full"}
    model = helpers.tiny_vit("gqa", **free)
    variables = helpers.random_variables(vit.variable_shapes(model, 1))
    description = {
        "model": {"name": "mu/4", **vit.arguments(model)},
        "channels": 1,
        "class_names": list("abcde"),
        "preprocessing": {"mean": 0.5, "std": 0.5},
    }
    checkpoint.save_model(tmp_path / "model", variables, description)
    convert.export(tmp_path / "model", tmp_path / "gqa.pth", "released")
    again = convert.load(tmp_path / "gqa.pth", num_heads=6).variables["params"]
    flat = flatten_dict(jax.device_get(variables["params"]), sep="/")
    for name, x in flatten_dict(again, sep="/").items():
        number = name.removeprefix("blocks_")[0] if name.startswith("blocks_") else ""
        old = (
            flat[name.replace(f"blocks_{number}", "blocks")][int(number)] if number else flat[name]
        )
        np.testing.assert_array_equal(x, old)


def test_half_precision_is_written_as_it_is_for_torch(tmp_path):
    path = model_directory(tmp_path / "model", "gqa", num_kv_heads=3, param_dtype="bfloat16")
    model, variables, _ = checkpoint.load_model(path)
    convert.export(path, tmp_path / "gqa.pth", "released")
    state = torch.load(tmp_path / "gqa.pth", weights_only=True)
    assert {x.dtype for x in state.values()} == {torch.bfloat16}
    kernel = np.asarray(variables["params"]["blocks_1"]["mlp"]["fc1"]["kernel"], np.float32)
    np.testing.assert_array_equal(state["blocks.1.mlp.fc1.weight"].float().numpy().T, kernel)
    assert dtypes(convert.to_pytorch(model, variables)) == {"float32"}


def test_double_precision_is_refused(tmp_path):
    """Files are read as float32."""
    jax.config.update("jax_enable_x64", True)
    try:
        path = model_directory(tmp_path / "model", "gqa", num_kv_heads=3, param_dtype="float64")
        for to in ("safetensors", "released"):
            with pytest.raises(UserError, match="cannot say param_dtype='float64'"):
                convert.export(path, tmp_path / "gqa", to)
    finally:
        jax.config.update("jax_enable_x64", False)


def test_the_layout_of_timm_is_for_what_timm_computes():
    for attention in ("kdgqa", "dgqa_ema"):
        model = helpers.tiny_vit(attention, num_kv_heads=6)
        variables = helpers.vit_variables(model)
        assert "blocks.0.attn.q.weight" in convert.to_pytorch(model, variables)
        with pytest.raises(UserError, match=f"no place for the groups of {attention}"):
            convert.to_pytorch(model, variables, "timm")


@pytest.mark.parametrize(
    "memory",
    [
        ["a"],
        {"blocks_0/attn/allocation": [6, 0]},
        {"blocks_0/attn/allocation": [3, 3, 3]},
        {"blocks_0/attn/allocation": [7, -1, 0]},
        {"blocks_0/attn/key_norm": "many"},
        {"blocks_0/attn/key_norm": None},
    ],
)
def test_a_memory_that_cannot_be_is_refused(tmp_path, memory):
    path = model_directory(tmp_path / "model", "dgqa_ema", num_kv_heads=3)
    convert.export(path, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as file:
        metadata = json.loads(file.metadata()["kdgqa_jax"])
    metadata["norm_stats"] = memory
    written = {"kdgqa_jax": json.dumps(metadata)}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", written)
    with pytest.raises(UserError, match="metadata: norm_stats"):
        convert.load(tmp_path / "b.safetensors")
