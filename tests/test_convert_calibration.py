"""Moments of a model's layers, and conversions that are calibrated with images or do without."""

import json
import subprocess
import sys
import types

import helpers
import jax
import numpy as np
import pytest
from helpers import N
from merging_helpers import (
    RULES,
    as_float32,
    of_low_rank,
    structured_tokens,
)
from PIL import Image

from kdgqa_jax import checkpoint, cli, convert, tree_utils
from kdgqa_jax.data import sources
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads import calibration, merging_vit

# --- moments ------------------------------------------------------------------------------------


def naive_moments(images):
    """(mean, second moment, moment centred per image) by a loop over the images' tokens."""
    stacked = np.concatenate(images)
    centred = np.concatenate([x - x.mean(0) for x in images])
    return tuple(
        sum(part) / len(stacked)
        for part in (stacked, [np.outer(t, t) for t in stacked], [np.outer(t, t) for t in centred])
    )


def assert_moments(moments, images, relative):
    mean, second, centred = naive_moments(images)
    helpers.assert_close(moments.mean, mean, relative)
    helpers.assert_close(moments.second, second, relative)
    helpers.assert_close(moments.centred, centred, relative)
    covariance = second - np.outer(mean, mean)
    helpers.assert_close(moments.covariance, covariance, relative)


def test_moments_of_padded_sequences_add_up():
    x = structured_tokens(20, images=5, length=6)
    lengths = [6, 1, 3, 6, 0]
    mask = np.arange(6) < np.array(lengths)[:, None]
    x[~mask] = np.nan
    moments = convert.InputMoments.of(x[:2], mask[:2]) + convert.InputMoments.of(x[2:], mask[2:])
    assert moments.tokens == 16
    assert_moments(moments, [row[:n] for row, n in zip(x, lengths, strict=True) if n], 1e-12)


def test_a_large_mean_costs_no_digits():
    x = structured_tokens(21, images=20) * 1e-4
    moments = convert.InputMoments.of(x + 1e3)
    helpers.assert_close(moments.centred, convert.InputMoments.of(x).centred, 1e-8)


@pytest.fixture(scope="module")
def mha():
    model = helpers.tiny_vit("mha")
    params = helpers.vit_variables(model)["params"]
    images = helpers.images(5) + 0.5
    return (
        model,
        params,
        images,
        convert.gather_moments(model, {"params": params}, images, batch_size=2),
    )


def test_moments_of_a_model_equal_a_naive_pass(mha):
    """Five images in batches of two: one of padding."""
    _, params, images, moments = mha
    inputs = []
    helpers.naive_vit(images, params, np.arange(N), patch=4, inputs=inputs)
    assert list(moments) == ["blocks_0", "blocks_1"]
    for (name, found), expected in zip(moments.items(), inputs, strict=True):
        assert found.tokens == 25, name
        assert_moments(found, list(expected), 1e-5)


def test_both_layouts_of_layers_give_the_same(mha):
    model, params, images, moments = mha
    stacked = tree_utils.stack_layers(params)
    scanned = convert.gather_moments(
        model.clone(scan_layers=True), {"params": stacked}, images, batch_size=5
    )
    for name in moments:
        helpers.assert_close(scanned[name].centred, moments[name].centred, 1e-5)
    one, said = convert.to_merged(params, 3, moments)
    two, again = convert.to_merged(stacked, 3, moments)
    jax.tree.map(np.testing.assert_array_equal, tree_utils.unstack_layers(two), one)
    np.testing.assert_array_equal(said["blocks_1"].keys_kept, again["blocks_1"].keys_kept)
    grouped = jax.eval_shape(lambda p: convert.to_grouped(p, 3), params)
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, grouped)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(one))


@pytest.mark.parametrize("calibrated", [True, False])
def test_every_layer_goes_by_its_own_moments(mha, calibrated):
    _, params, _, moments = mha
    merged, said = convert.to_merged(params, 2, moments if calibrated else None)
    for name in ("blocks_0", "blocks_1"):
        norm = params[name]["norm1"]
        own = convert.data_free_moments(norm["scale"], norm["bias"])
        own = moments[name] if calibrated else own
        expected = convert.merge_heads(params[name]["attn"], 2, own)
        helpers.assert_close(merged[name]["attn"], as_float32(expected.attention), 0)
        np.testing.assert_array_equal(said[name].key_lost, expected.key_lost)
        for kept in ("norm1", "norm2", "mlp"):
            assert merged[name][kept] is params[name][kept]


def test_a_model_keeps_its_logits_where_heads_are_of_low_rank(mha):
    """The whole model, 6 to 3 heads, calibrated and without data."""
    model, params, images, _ = mha
    params = jax.tree.map(np.asarray, params)
    for i in range(2):
        attention = jax.tree.map(np.array, params[f"blocks_{i}"]["attn"])
        attention = as_float32(of_low_rank(attention, 3, seed=i))
        params = {**params, f"blocks_{i}": {**params[f"blocks_{i}"], "attn": attention}}
    expected = helpers.naive_vit(images, params, np.arange(N), patch=4)
    gathered = convert.gather_moments(model, {"params": params}, images, batch_size=2)
    for moments in (gathered, None):
        merged, said = convert.to_merged(params, 3, moments)
        logits = helpers.naive_vit(images, merged, np.repeat(np.arange(3), 2), patch=4)
        helpers.assert_close(logits, expected, 1e-5)
        assert all(m.keys_kept.min() > 1 - 1e-6 for m in said.values())


def test_batches_are_split_over_all_devices_but_those_along_model(monkeypatch):
    monkeypatch.setattr(calibration.sharding, "put_batch", lambda batch, mesh: batch)
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "model": 2})
    batches = list(calibration.padded_batches(helpers.images(5), 3, mesh))
    assert [len(batch["image"]) for batch in batches] == [4, 4]
    np.testing.assert_array_equal(np.concatenate([b["mask"] for b in batches]), np.arange(8) < 5)


# --- as conversion does it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(mha, tmp_path_factory):
    """A model directory with the parameters of `mha`."""
    _, params, _, _ = mha
    return save_model(tmp_path_factory.mktemp("source"), {"params": params}, "mha")


def save_model(folder, variables, attention, **options):
    """A model directory in `folder`."""
    description = {
        "model": {"name": "mu/4", "attention": attention, **helpers.TINY, **options},
        "channels": 1,
        "class_names": [str(i) for i in range(5)],
        "preprocessing": {"mean": [0.5], "std": [0.5]},
    }
    checkpoint.save_model(folder / "model", variables, description)
    return folder / "model"


def test_conversion_with_calibration_images(source, mha, tmp_path):
    _, params, images, moments = mha
    converted = convert.load(
        source, attention="gqa", num_kv_heads=3, pooling="svd", calibration=images
    )
    expected, merged = convert.to_merged(params, 3, moments)
    helpers.assert_close(converted.variables["params"], expected, 1e-5)
    note = converted.report.notes[-1]
    least = merged["blocks_1"].keys_kept.min()
    assert "heads merged by svd, calibrated with 5 images" in note
    assert f"1: {least:.1%} of keys" in note
    converted.save(tmp_path / "model")
    converted = json.loads((tmp_path / "model" / "model.json").read_text())["converted"]
    kept = np.array(converted["energy_kept"]["blocks_1"]["keys"])
    helpers.assert_close(kept, merged["blocks_1"].keys_kept, 1e-5)
    how = {row["parameter"]: row["how"] for row in converted["parameters"]}
    assert "merged 6 to 3 heads (svd)" in how["blocks_0..1/attn/key/kernel"]
    assert "adapted to merged heads (svd)" in how["blocks_0..1/attn/out/bias"]


ON_EIGHT = """
import sys
import jax
import numpy as np
from kdgqa_jax import convert

source, images, out = sys.argv[1:]
assert jax.device_count() == 8
given = {"num_kv_heads": 3, "pooling": "svd", "calibration": np.load(images), "refit": True}
convert.load(source, attention="gqa", **given).save(out)
"""


@pytest.mark.slow
def test_eight_devices_calibrate_and_refit_as_one(source, mha, tmp_path):
    """Five images, so that some devices have padding alone."""
    _, _, images, _ = mha
    np.save(tmp_path / "images.npy", images)
    paths = [str(source), str(tmp_path / "images.npy"), str(tmp_path / "model")]
    ended = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, *paths],
        env=helpers.child_environment(8),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    given = {"num_kv_heads": 3, "pooling": "svd", "calibration": images, "refit": True}
    expected = convert.load(source, attention="gqa", **given).variables["params"]
    found = checkpoint.load_model(tmp_path / "model")[1]["params"]
    helpers.assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_conversion_without_data_says_so(source, mha, rule):
    _, params, _, _ = mha
    converted = convert.load(source, attention="gqa", num_kv_heads=2, pooling=rule)
    expected, _ = convert.to_merged(params, 2, None, rule)
    helpers.assert_close(converted.variables["params"], expected, 1e-6)
    assert f"heads merged by {rule}, without data" in converted.report.notes[-1]


@pytest.mark.parametrize("attention", helpers.GROUPED)
def test_variants_that_send_query_heads_elsewhere_are_warned_about(source, attention):
    report = convert.load(source, attention=attention, num_kv_heads=3, pooling="svd").report
    if attention in ("kdgqa", *helpers.DGQA):
        (warning,) = report.warnings
        assert "no longer matches it" in warning and attention in warning
        assert report.to_json()["warnings"] == [warning]
    else:
        assert report.warnings == []
    assert convert.load(source, attention=attention, num_kv_heads=3).report.warnings == []


def test_a_source_with_an_allocation_of_its_own(tmp_path):
    """Heads are merged for the query heads that they serve, not for equal groups."""
    model = helpers.tiny_vit("dgqa_diff")
    variables = jax.device_get(helpers.vit_variables(model))
    allocations = np.array([4, 1, 1]), np.array([1, 2, 3])
    for i, allocation in enumerate(allocations):
        variables["norm_stats"][f"blocks_{i}"]["attn"]["allocation"] = allocation.astype(np.int32)
    params, images = variables["params"], helpers.images(5)
    expanded = merging_vit.one_per_query_head(params, allocations)
    expected = helpers.apply(model, variables, images)
    logits = helpers.naive_vit(images, expanded, np.arange(N), patch=4)
    helpers.assert_close(logits, expected, 1e-4)
    stacked = merging_vit.one_per_query_head(tree_utils.stack_layers(params), allocations)
    helpers.assert_close(tree_utils.unstack_layers(stacked), expanded, 0)

    path = save_model(tmp_path, variables, "dgqa_diff", num_kv_heads=3)
    found = convert.load(path, attention="gqa", num_kv_heads=1, pooling="svd")
    merged, _ = convert.to_merged(expanded, 1)
    helpers.assert_close(found.variables["params"], merged, 1e-6)
    assert found.report.warnings == []


def test_a_source_whose_query_heads_move_is_warned_about(source, tmp_path):
    convert.load(source, attention="kdgqa", num_kv_heads=3).save(tmp_path / "kdgqa")
    options = {"attention": "gqa", "num_kv_heads": 1, "pooling": "svd"}
    (warning,) = convert.load(tmp_path / "kdgqa", **options).report.warnings
    assert "query heads of a kdgqa model go to other key/value heads" in warning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": helpers.images(2, side=12)}, r"must be \(n, 8, 8, 1\), got shape \(2, 12"),
        ({"calibration": helpers.images(2, channels=3)}, r"must be \(n, 8, 8, 1\)"),
        ({"calibration": helpers.images(0)}, "calibration images must be"),
        ({"calibration": helpers.images(2)[0]}, "calibration images must be"),
        ({"calibration": helpers.images(2) * np.nan}, "NaN or infinity"),
        ({"calibration": helpers.images(2), "pooling": "mean"}, "'mean' takes no calibration"),
        ({"pooling": "sdv"}, "unknown pooling 'sdv': did you mean 'svd'"),
    ],
)
def test_bad_conversions_are_refused(source, options, message):
    with pytest.raises(UserError, match=message):
        convert.load(source, **{"attention": "gqa", "pooling": "svd", **options})


# --- images by name -----------------------------------------------------------------------------


def save_images(folder, pixels):
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


def test_images_of_a_data_set_are_prepared_as_the_checkpoint_says():
    """Digits, resized and made RGB by hand; the choice depends on the seed alone."""
    preparation = Preprocessing(mean=[0.1, 0.2, 0.3], std=0.5)
    asked = convert.CalibrationImages("digits", count=5, seed=3)
    found = asked.read((12, 16), 3, preparation)
    split = sources.load("digits").train
    chosen = sorted(np.random.default_rng(3).permutation(len(split))[:5])
    for image, index in zip(found, chosen, strict=True):
        grey = Image.fromarray(split[int(index)]["image"][..., 0]).convert("RGB")
        pixels = np.asarray(grey.resize((16, 12), Image.Resampling.BILINEAR), np.float64) / 255
        helpers.assert_close(image, (pixels - [0.1, 0.2, 0.3]) / 0.5, 1e-6)
    np.testing.assert_array_equal(asked.read((12, 16), 3, preparation), found)
    other = convert.CalibrationImages("digits", count=5, seed=4).read((12, 16), 3, preparation)
    assert not np.array_equal(other, found)
    assert (
        len(convert.CalibrationImages("digits", count=9999).read((8, 8), 1, Preprocessing()))
        == 1437
    )


def test_images_of_a_folder_are_found_at_any_depth(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 6, 5, 3), np.uint8)
    save_images(tmp_path / "a" / "b", pixels[:2])
    save_images(tmp_path / "c", pixels[2:])
    found = convert.CalibrationImages(str(tmp_path)).read((6, 5), 3, Preprocessing())
    helpers.assert_close(found, (pixels / 255 - 0.5) / 0.5, 1e-6)


def test_images_of_four_channels_are_refused():
    with pytest.raises(UserError, match="digits give 1 or 3 channels, the model takes 4"):
        convert.CalibrationImages("digits").read((8, 8), 4, Preprocessing())


def convert_command(source, out, *options):
    arguments = ["--source", str(source), "--out", str(out), "--num-kv-heads", "3"]
    return cli.main(["convert", *arguments, *map(str, options)])


def test_command_line_calibrates_and_refits(source, tmp_path, capsys):
    options = ("--attention", "gqa", "--pooling", "svd", "--calibration", "digits")
    options += ("--calibration-images", 20, "--seed", 1)
    assert convert_command(source, tmp_path / "out", *options, "--refit") == 0
    shown = capsys.readouterr()
    assert "calibration images: 20 of digits, seed 1" in shown.out and shown.err == ""
    assert "calibrated with 20 images" in shown.out and "refitted with 20 images" in shown.out
    images = convert.CalibrationImages("digits", count=20, seed=1)
    expected = convert.load(
        source, attention="gqa", num_kv_heads=3, pooling="svd", calibration=images, refit=True
    )
    _, variables, _ = checkpoint.load_model(tmp_path / "out")
    helpers.assert_close(variables, jax.device_get(expected.variables), 1e-6)


def test_command_line_warns_on_standard_error(source, tmp_path, capsys):
    options = ("--attention", "kdgqa", "--pooling", "svd")
    assert convert_command(source, tmp_path / "out", *options) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("kdgqa convert: warning: svd fits") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--refit",), "--refit needs --calibration"),
        (("--calibration", "digit"), "'digit' is neither a folder of images nor a data set"),
        (("--calibration", "fashion_mnist"), "needs a data directory (--data-dir DIR)"),
        (("--calibration", "{tmp}"), "holds no images"),
        (
            ("--calibration", "digits", "--calibration-images", 0),
            "--calibration-images: '0' must be",
        ),
        (("--calibration", "digits", "--pooling", "mean"), "'mean' takes no calibration images"),
        (("--calibration", "digits", "--to", "released"), "--calibration belong to a conversion"),
        (("--calibration-images", 64, "--data-dir", "x"), "--data-dir need --calibration (a data"),
    ],
)
def test_command_line_says_what_calibration_lacks(source, tmp_path, capsys, options, says):
    options = [str(option).replace("{tmp}", str(tmp_path)) for option in options]
    given = ("--attention", "gqa", "--pooling", "svd") if "--to" not in options else ()
    assert convert_command(source, tmp_path / "out", *given, *options) in (1, 2)
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- how few heads will do ----------------------------------------------------------------------


def test_suggestions_are_the_smallest_numbers_that_keep_the_share(source, mha, capsys):
    _, params, _, _ = mha
    rows, by = convert.suggest_kv_heads(source, 0.75)
    assert "without data" in by
    for i, row in enumerate(rows):
        block = params[f"blocks_{i}"]
        moments = convert.data_free_moments(**block["norm1"])
        shares = {}
        for heads in (1, 2, 3, 6):
            merged = convert.merge_heads(block["attn"], heads, moments)
            keys = 1 - merged.key_lost.sum() / merged.key_energy.sum()
            values = 1 - merged.value_lost.sum() / merged.value_energy.sum()
            shares[heads] = (keys, values)
        fewest = min(k for k, kept in shares.items() if min(kept) >= 0.75)
        assert row[:2] == (str(i), str(fewest))
        assert row[2:] == tuple(f"{100 * kept:.2f}" for kept in shares[fewest])
    command = ["inspect", "--checkpoint", str(source), "--calibration", "digits"]
    assert cli.main([*command, "--calibration-images", "8", "--suggest-kv-heads", "1"]) == 0
    assert "keeps 1 with 6 of 6 key/value heads, on 8 images" in capsys.readouterr().out
    for wrong in ([*command], [*command, "--suggest-kv-heads", "1.5"]):
        assert cli.main(wrong) == 1
    shown = capsys.readouterr().err
    assert (
        "--calibration belong to --suggest-kv-heads" in shown and "share 1.5 of the energy" in shown
    )


def test_the_number_suggested_for_all_layers_suits_each_of_them(mha, tmp_path):
    """Two equal triples of heads, then three equal pairs: only six heads are enough for both."""
    _, params, _, _ = mha
    params = jax.tree.map(np.array, params)
    for i, equal in enumerate((3, 2)):
        for projection in ("key", "value"):
            for leaf, x in params[f"blocks_{i}"]["attn"][projection].items():
                few = np.split(x, N // equal, axis=-2)
                repeated = [np.repeat(heads[..., :1, :], equal, axis=-2) for heads in few]
                params[f"blocks_{i}"]["attn"][projection][leaf] = np.concatenate(repeated, axis=-2)
    path = save_model(tmp_path, {"params": params}, "mha")
    rows, said = convert.suggest_kv_heads(path, 0.999)
    assert [row[1] for row in rows] == ["2", "3"]
    assert "keeps 0.999 with 6 of 6" in said
