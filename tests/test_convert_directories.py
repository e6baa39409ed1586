"""Conversions of model directories: heads that stay, half precision, memories of gradients."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import dtypes, model_directory
from helpers import N

from kdgqa_jax import analysis, checkpoint, cli, config, convert, initial, tree_utils, vit
from kdgqa_jax.convert import files
from kdgqa_jax.errors import UserError

# --- as many key/value heads as before ----------------------------------------------------------


def start_from(path, **fields):
    settings = config.train_config()
    settings.init = str(path)
    settings.update_from_flattened_dict({f"model.{name}": x for name, x in fields.items()})
    return initial.load(settings, num_classes=5, channels=1)


@pytest.mark.parametrize("attention", ["gqa", "kdgqa", "dgqa_ema", "pgqa"])
def test_a_grouped_model_keeps_its_heads(tmp_path, attention):
    """With K = N, too; by `convert` and as the start of a run."""
    path = model_directory(tmp_path / "model", attention, num_kv_heads=N)
    before = convert.load(path, num_kv_heads=N)
    for after in (convert.load(path), convert.load(path, attention="gqa", num_classes=3)):
        assert after.model.attention.num_kv_heads == N
        jax.tree.map(
            np.testing.assert_array_equal,
            after.variables["params"]["blocks_1"],
            before.variables["params"]["blocks_1"],
        )
    for start in (start_from(path), start_from(path, attention="dgqa_diff")):
        assert start.build().attention.num_kv_heads == N
        assert start.variables["params"]["blocks_0"]["attn"]["key"]["bias"].shape == (N, helpers.H)


def test_a_multi_head_model_is_halved(tmp_path):
    path = model_directory(tmp_path / "model", "mha")
    assert convert.load(path).model.attention.num_kv_heads == N
    converted = convert.load(path, attention="kdgqa")
    assert converted.model.attention.num_kv_heads == N // 2
    assert converted.description["model"]["num_kv_heads"] == N // 2
    assert start_from(path, attention="kdgqa").build().attention.num_kv_heads == N // 2


# --- half precision -----------------------------------------------------------------------------


def in_float32(path, tmp_path):
    """The same model directory with parameters in float32."""
    _, variables, description = checkpoint.load_model(path)
    variables["params"] = jax.tree.map(lambda x: x.astype(np.float32), variables["params"])
    description["model"]["param_dtype"] = "float32"
    checkpoint.save_model(tmp_path / "float32", variables, description)
    return tmp_path / "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 3},
        {"num_classes": 0},
        {"channels": 1, "image_size": 12},
        {"attention": "gqa", "num_kv_heads": 2},
        {"attention": "kdgqa", "num_kv_heads": 3, "pooling": "svd"},
    ],
)
def test_a_conversion_rounds_once(tmp_path, options, dtype):
    """What float32 gives for the same numbers, rounded; the directory that it leaves loads."""
    channels = 3 if "channels" in options else 1
    path = model_directory(tmp_path / "model", "mha", param_dtype=dtype)
    if channels == 3:
        model, variables, description = checkpoint.load_model(path)
        description["channels"] = 3
        kernel = helpers.normal(0, 4, 4, 3, 48).astype(model.param_dtype)
        variables["params"]["patch_embed"]["kernel"] = kernel
        checkpoint.save_model(path, variables, description)
    exact = convert.load(in_float32(path, tmp_path), **options)
    converted = convert.load(path, **options)
    assert converted.model.clone(param_dtype="float32") == exact.model
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype), exact.variables["params"])
    converted.save(tmp_path / "converted")
    _, variables, _ = checkpoint.load_model(tmp_path / "converted")
    assert dtypes(variables["params"]) == {dtype}
    jax.tree.map(np.testing.assert_array_equal, variables["params"], expected)


def test_refitting_in_half_precision(tmp_path):
    path = model_directory(tmp_path / "model", "mha", param_dtype="bfloat16")
    options = {"attention": "gqa", "num_kv_heads": 3, "calibration": helpers.images(6)}
    converted = convert.load(path, **options, pooling="svd", refit=True)
    converted.save(tmp_path / "converted")
    assert dtypes(checkpoint.load_model(tmp_path / "converted")[1]) == {"bfloat16"}
    assert "refitted with 6 images" in converted.report.notes[-1]


def test_heads_are_grouped_into_the_dtype_that_is_wanted():
    """As a study does it: uptraining may have another `param_dtype` than pretraining."""
    before = helpers.tiny_vit("mha")
    variables = jax.device_get(helpers.vit_variables(before))
    after = helpers.tiny_vit("gqa", param_dtype="bfloat16")
    grouped = convert.group_heads(before, variables, after)
    expected = tree_utils.cast(convert.to_grouped(variables["params"], 3), "bfloat16")
    assert dtypes(grouped.params) == {"bfloat16"}
    jax.tree.map(np.testing.assert_array_equal, grouped.params, expected)


@pytest.mark.parametrize(
    ("there", "here"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")],
)
def test_a_run_has_the_dtype_of_its_config(tmp_path, there, here):
    path = model_directory(tmp_path / "model", "dgqa_ema", param_dtype=there)
    start = start_from(path, param_dtype=here)
    assert f"parameters cast from {there} to {here} (config.model.param_dtype)" in start.notes
    assert dtypes(start.variables["params"]) == {here}
    assert dtypes(start.variables["norm_stats"]) == {"float32", "int32"}
    expected = checkpoint.load_model(path)[1]["params"]
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(here)),
        start.variables["params"],
        expected,
    )
    initial.check_shapes(str(path), start.variables, vit.variable_shapes(start.build(), 1))
    other = vit.variable_shapes(start.build().clone(param_dtype=there), 1)
    says = rf"does not fit config.model: params/blocks_0/attn/key/bias \({here}\[3, 8\] there"
    with pytest.raises(UserError, match=says):
        initial.check_shapes(str(path), start.variables, other)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    path = model_directory(tmp_path / "model", "gqa")
    _, variables, description = checkpoint.load_model(path)
    variables["params"]["blocks_1"]["mlp"]["fc1"]["bias"][3] = 1e5
    checkpoint.save_model(path, variables, description)
    start_from(path, param_dtype="bfloat16")
    with pytest.raises(
        UserError, match="blocks_1/mlp/fc1/bias holds numbers too large for float16"
    ):
        start_from(path, param_dtype="float16")


def test_numpy_files_of_bfloat16(tmp_path):
    """NumPy writes ml_dtypes' bfloat16 as two bytes without a type."""
    array = helpers.normal(0, 3, 4).astype(jnp.bfloat16)
    np.savez(tmp_path / "a.npz", embedding=array, count=np.arange(3))
    found = files.read(str(tmp_path / "a.npz")).arrays
    assert found["embedding"].dtype == np.float32 and found["count"].dtype == np.int64
    np.testing.assert_array_equal(found["embedding"], array.astype(np.float32))


# --- memories without an allocation -------------------------------------------------------------


SCORES = [0.5, 3.0, 2.0]


@pytest.fixture
def by_gradient(tmp_path):
    """A kdgqa model whose groups follow from remembered gradients, in every evaluation."""
    options = {"num_kv_heads": 3, "importance": "gradient", "memory": {"key_gradient": SCORES}}
    return model_directory(tmp_path / "model", "kdgqa", **options)


def test_groups_that_gradients_fix_are_known(by_gradient, capsys):
    model, variables, _ = checkpoint.load_model(by_gradient)
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, helpers.images(3))
    expected = helpers.naive_kdgqa(SCORES, N)
    assert expected != [2, 2, 2]
    for allocation in (
        *seen.allocation,
        *analysis.fixed_allocations(model, variables["norm_stats"]),
    ):
        np.testing.assert_array_equal(allocation, expected)
    _, rows = analysis.summarise(by_gradient)
    shown = " ".join(map(str, expected)), str(expected.count(0)), "key_gradient 0.5 3 2"
    assert rows[0][1:4] == shown


def test_heads_are_merged_for_the_groups_that_gradients_fix(by_gradient):
    """A merge that loses nothing: each key/value head once for each query head it serves."""
    _, variables, _ = checkpoint.load_model(by_gradient)
    allocation = helpers.naive_kdgqa(SCORES, N)
    found = convert.load(by_gradient, attention="gqa", num_kv_heads=1, pooling="svd")
    assert found.report.warnings == []
    repeated = jax.tree.map(np.array, variables["params"])
    for i in range(2):
        for projection in ("key", "value"):
            leaves = repeated[f"blocks_{i}"]["attn"][projection]
            for leaf, x in leaves.items():
                leaves[leaf] = x[..., helpers.naive_index(allocation), :]
    expected, _ = convert.to_merged(repeated, 1)
    helpers.assert_close(found.variables["params"], expected, 1e-5)


def test_fewer_heads_are_suggested_for_memories_of_gradients(by_gradient):
    rows, said = convert.suggest_kv_heads(by_gradient, 1.0)
    assert [row[1] for row in rows] == ["3", "3"] and "equal" not in said


@pytest.mark.parametrize("attention", ["kdgqa", "dgqa_ema", "dgqa_diff", "gqa"])
def test_a_model_grouped_by_gradients_becomes_any_other(by_gradient, tmp_path, attention):
    """Refitting runs it with the memory that it will have."""
    options = {"pooling": "mean", "calibration": helpers.images(3), "refit": True}
    converted = convert.load(by_gradient, attention=attention, **options)
    converted.save(tmp_path / "converted")
    _, variables, _ = checkpoint.load_model(tmp_path / "converted")
    if attention != "gqa":
        kept = variables["norm_stats"]["blocks_1"]["attn"]
        np.testing.assert_array_equal(kept["key_gradient"], SCORES)


def test_a_run_that_scores_heads_in_another_way_begins_a_new_memory(tmp_path):
    memory = {"key_norm": [3, 2, 1], "allocation": [1, 1, 4]}
    path = model_directory(tmp_path / "model", "dgqa_ema", num_kv_heads=3, memory=memory)
    kept = start_from(path).variables["norm_stats"]["blocks_0"]["attn"]
    np.testing.assert_array_equal(kept["allocation"], [1, 1, 4])
    new = start_from(path, importance="gradient")
    like = vit.variable_shapes(new.build(), 1)
    initial.check_shapes("", new.variables, like)
    np.testing.assert_array_equal(
        new.variables["norm_stats"]["blocks_0"]["attn"]["allocation"], [2, 2, 2]
    )


def test_flags_of_suggestions_are_not_ignored(by_gradient, capsys):
    for flags in (["--calibration-images", "8"], ["--data-dir", "x"], ["--seed", "1"]):
        assert cli.main(["inspect", "--checkpoint", str(by_gradient), *flags]) == 1
        assert f"{flags[0]} belong to --suggest-kv-heads" in capsys.readouterr().err
