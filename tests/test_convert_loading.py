"""Checkpoints of every kind give the numbers of the framework that they come from."""

import json
import re

import helpers
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from kdgqa_jax import checkpoint, cli, convert, predict, vit

RELEASED = ("released_mhsa", "released_gqa", "released_kdgqa", "released_kdgqa_k6",
            "released_dgqa_ema")  # fmt: skip


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def save_pth(path, weights):
    torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, path)
    return path


@pytest.fixture
def golden_file(golden, tmp_path):
    """(golden, its .pth file, its images as .npy)."""

    def write(name):
        values = golden(name)
        path = save_pth(tmp_path / f"{name}.pth", helpers.golden_weights(values))
        images = tmp_path / "images.npy"
        np.save(images, values["images_nchw"].transpose(0, 2, 3, 1))
        return values, path, images

    return write


# --- the released code and timm -----------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_through_the_command_line(golden_file, tmp_path, name):
    golden, path, images = golden_file(name)
    out, logits = tmp_path / "model", tmp_path / "logits.npy"
    run("convert", "--source", path, "--num-heads", golden["num_heads"], "--out", out)
    run("predict", "--checkpoint", out, "--images", images, "--out", logits)
    helpers.assert_close(np.load(logits), golden["logits"], 1e-5)
    _, predictions, _ = predict.predict_files(out, [images])
    if "allocation" in golden:
        np.testing.assert_array_equal(predictions.allocation[0], golden["allocation"])
    model, variables, _ = checkpoint.load_model(out)
    assert model.attention.variant == str(golden["scheme"]).replace("mhsa", "mha")
    if name == "released_dgqa_ema":
        kept = variables["norm_stats"]["blocks_1"]["attn"]
        np.testing.assert_array_equal(kept["key_norm"], golden["weights/blocks.1.attn.cache"])
        np.testing.assert_array_equal(kept["allocation"], golden["allocation"][1])


def test_the_variant_of_grouped_weights_has_to_be_said(golden_file, tmp_path, capsys):
    _, path, _ = golden_file("released_kdgqa")
    unnamed = path.rename(tmp_path / "vit_dgqa.pth")  # holds "gqa", which is not its name
    arguments = ["convert", "--source", str(unnamed), "--num-heads", "6", "--out"]
    assert cli.main([*arguments, str(tmp_path / "a")]) == 1
    assert "give --attention" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    run(*arguments, tmp_path / "b", "--attention", "pgqa")
    model, _, _ = checkpoint.load_model(tmp_path / "b")
    assert (model.attention.variant, model.attention.num_kv_heads) == ("pgqa", 3)


def test_timm_file_and_its_mean_pooled_version(golden_file, tmp_path):
    golden, path, images = golden_file("timm_vit")
    for attention, logits in (("mha", "logits_mha"), ("gqa", "logits_gqa_mean_pooled")):
        out, written = tmp_path / attention, tmp_path / f"{attention}.npy"
        run("convert", "--source", path, "--num-heads", 6, "--out", out, "--attention", attention)
        run("predict", "--checkpoint", out, "--images", images, "--out", written)
        helpers.assert_close(np.load(written), golden[logits], 1e-5)
    _, variables, description = checkpoint.load_model(tmp_path / "gqa")
    for i in range(2):
        qkv = {x: golden[f"weights/blocks.{i}.attn.qkv.{x}"] for x in ("weight", "bias")}
        for third, name in ((1, "key"), (2, "value")):
            rows = qkv["weight"][48 * third : 48 * (third + 1)]  # 6 heads of 8
            bias = qkv["bias"][48 * third : 48 * (third + 1)]
            pooled = variables["params"][f"blocks_{i}"]["attn"][name]
            expected = rows.reshape(3, 2, 8, 48).mean(1)
            helpers.assert_close(pooled["kernel"].transpose(1, 2, 0), expected, 1e-6)
            helpers.assert_close(pooled["bias"], bias.reshape(3, 2, 8).mean(1), 1e-6)
    rows = description["converted"]["parameters"]
    assert {
        "parameter": "blocks_0..1/attn/key/kernel",
        "shape": "48x3x8",
        "from": "blocks.*.attn.qkv.weight",
        "how": "second third; transposed, by head; pooled 6 to 3 heads (mean)",
    } in rows


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrapped_and_old_pickles(golden, tmp_path, wrapper, legacy):
    weights = helpers.golden_weights(golden("timm_vit"))
    tensors = {f"module.{name}": torch.from_numpy(x) for name, x in weights.items()}
    path = tmp_path / "wrapped.bin"
    torch.save({wrapper: tensors, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    plain = convert.load(save_pth(tmp_path / "plain.pth", weights), num_heads=6)
    wrapped = convert.load(path, num_heads=6)
    jax.tree.map(np.testing.assert_array_equal, wrapped.variables, plain.variables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_other_widths(golden, tmp_path, dtype):
    from safetensors.torch import save_file as save_torch

    weights = helpers.golden_weights(golden("timm_vit"))
    tensors = {name: torch.from_numpy(x).to(dtype) for name, x in weights.items()}
    save_torch(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        params = convert.load(tmp_path / name, num_heads=6).variables["params"]
        expected = tensors["blocks.1.mlp.fc1.weight"].float().numpy().T
        np.testing.assert_array_equal(params["blocks_1"]["mlp"]["fc1"]["kernel"], expected)


def test_average_pooling_and_missing_qkv_bias(golden, tmp_path):
    """timm's global_pool="avg": fc_norm instead of norm."""
    weights = helpers.golden_weights(golden("timm_vit"))
    weights = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: x
               for n, x in weights.items() if not n.endswith("qkv.bias")}  # fmt: skip
    save_file(weights, tmp_path / "a.safetensors")
    converted = convert.load(tmp_path / "a.safetensors", num_heads=6)
    assert converted.model.pool == "avg" and converted.model.attention.qkv_bias is False
    images = helpers.normal(0, 2, 32, 32, 3)
    logits = helpers.apply(converted.model, converted.variables, images)
    params = converted.variables["params"]
    expected = helpers.naive_vit(images, params, np.arange(6), 8, pool="avg")
    helpers.assert_close(logits, expected, 1e-5)


# --- fitting ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 24)), ((14, 14), (7, 10)),
                                          ((6, 9), (9, 4))])  # fmt: skip
@pytest.mark.parametrize("prefix", [1, 2])
def test_position_embedding_is_resized_as_timm_calls_torch(old, new, prefix):
    """timm: bicubic with antialias=True."""
    embedding = helpers.normal(0, 1, prefix + old[0] * old[1], 16)
    resized = convert.resize_pos_embed(embedding, old, new, prefix)
    grid = torch.from_numpy(embedding[:, prefix:].reshape(1, *old, 16)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", antialias=True)
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 16).numpy()
    helpers.assert_close(resized[:, prefix:], expected, 1e-5)
    np.testing.assert_array_equal(resized[:, :prefix], embedding[:, :prefix])


def test_other_image_size_through_the_command_line(golden_file, tmp_path):
    golden, path, _ = golden_file("timm_vit")
    out = tmp_path / "model"
    run("convert", "--source", path, "--num-heads", 6, "--out", out, "--image-size", "48x16")
    model, variables, _ = checkpoint.load_model(out)
    assert model.image_shape == (48, 16)
    expected = convert.resize_pos_embed(golden["weights/pos_embed"], (4, 4), (6, 2), 1)
    np.testing.assert_array_equal(variables["params"]["pos_embed"], expected)


def test_input_channels_as_timm_fits_them(golden, tmp_path):
    weights = helpers.golden_weights(golden("timm_vit"))
    save_file(weights, tmp_path / "a.safetensors")
    rgb = convert.load(tmp_path / "a.safetensors", num_heads=6)
    grey = convert.load(tmp_path / "a.safetensors", num_heads=6, channels=1)
    image = helpers.normal(0, 2, 32, 32, 1)
    expected = helpers.apply(rgb.model, rgb.variables, np.repeat(image, 3, axis=-1))
    helpers.assert_close(helpers.apply(grey.model, grey.variables, image), expected, 1e-5)
    assert grey.description["channels"] == 1
    assert grey.description["preprocessing"]["mean"] == [0.5]
    kernel = rgb.variables["params"]["patch_embed"]["kernel"]
    five = convert.adapt_input_channels(kernel, 5)
    helpers.assert_close(five, kernel[:, :, [0, 1, 2, 0, 1]] * 0.6, 1e-6)


def test_another_number_of_classes_gives_a_new_head(golden, tmp_path):
    save_file(helpers.golden_weights(golden("timm_vit")), tmp_path / "a.safetensors")
    kept = convert.load(tmp_path / "a.safetensors", num_heads=6, num_classes=7)
    assert np.any(kept.variables["params"]["head"]["kernel"])
    new = convert.load(tmp_path / "a.safetensors", num_heads=6, num_classes=3)
    assert new.variables["params"]["head"]["kernel"].shape == (48, 3)
    assert not np.any(new.variables["params"]["head"]["kernel"])
    assert "class head: the one for 7 classes dropped, one for 3 new" in new.report.notes
    assert ("head/kernel", "48x3", "", "new, zero") in new.report.rows()
    assert "head/kernel 48x3: -, new, zero\n" in str(new.report)
    none = convert.load(tmp_path / "a.safetensors", num_heads=6, num_classes=0)
    assert "head" not in none.variables["params"]


# --- our own directories ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory of dgqa_ema with 8 query heads, 4 key/value heads and a memory."""
    options = {"name": "mu/4", "depth": 2, "image_size": 8, "num_classes": 3}
    model = vit.create(**options, attention="dgqa_ema", num_kv_heads=4)
    variables = helpers.randomise(vit.init_variables(model, jax.random.key(0), 1))
    for layer, allocation in enumerate(([5, 1, 1, 1], [0, 4, 2, 2])):
        kept = variables["norm_stats"][f"blocks_{layer}"]["attn"]
        kept["key_norm"] = np.float32([4, 3, 2, 1 + layer])
        kept["allocation"] = np.int32(allocation)
    path = tmp_path_factory.mktemp("trained") / "model"
    description = {
        "model": {**options, "attention": "dgqa_ema", "num_kv_heads": 4},
        "channels": 1,
        "class_names": ["a", "b", "c"],
        "preprocessing": {"mean": 0.5, "std": 0.5},
    }
    checkpoint.save_model(path, variables, description)
    return path


def test_grouped_to_fewer_heads(trained):
    before, after = convert.load(trained), convert.load(trained, num_kv_heads=2)
    assert after.model.attention.num_kv_heads == 2
    flat = {n: flatten_dict(c.variables["params"], sep="/") for n, c in
            (("before", before), ("after", after))}  # fmt: skip
    for name, x in flat["after"].items():
        old = np.asarray(flat["before"][name])
        if re.search("/attn/(key|value)/", name):
            old = (old[..., 0::2, :] + old[..., 1::2, :]) / 2
        helpers.assert_close(x, old, 1e-6)
    kept = after.variables["norm_stats"]["blocks_0"]["attn"]
    np.testing.assert_array_equal(kept["allocation"], [4, 4])  # the memory of 4 heads is void


@pytest.mark.parametrize("attention", ["gqa", "kdgqa", "dgqa_diff", "pgqa"])
def test_any_variant_to_any_variant(trained, tmp_path, attention):
    converted = convert.load(trained, attention=attention)
    converted.save(tmp_path / "model")
    model, variables, description = checkpoint.load_model(tmp_path / "model")
    assert model.attention.variant == attention
    assert model.attention.num_kv_heads == 4 and description["class_names"] == ["a", "b", "c"]
    before = convert.load(trained)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], before.variables["params"])
    if attention == "dgqa_diff":  # the same kind of memory
        kept = variables["norm_stats"]["blocks_1"]["attn"]
        np.testing.assert_array_equal(kept["allocation"], [0, 4, 2, 2])
        np.testing.assert_array_equal(kept["key_norm"], [4, 3, 2, 2])
    else:
        assert "norm_stats" not in variables


def test_directory_is_self_contained(golden_file, tmp_path):
    _, path, _ = golden_file("released_gqa")
    out = tmp_path / "model"
    run("convert", "--source", path, "--num-heads", 6, "--out", out, "--mean", "0.4,0.5,0.6")
    path.unlink()
    description = json.loads((out / "model.json").read_text())
    assert description["converted"]["source"] == str(path)
    assert description["preprocessing"]["mean"] == [0.4, 0.5, 0.6]
    assert description["versions"]["jax"] == jax.__version__
    assert description["class_names"] == [str(i) for i in range(7)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npy", "model"]
    out.rename(tmp_path / "moved")
    run("inspect", "--checkpoint", tmp_path / "moved")


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RELEASED, "timm_vit"])
@pytest.mark.parametrize("to", ["safetensors", "released"])
def test_round_trips_are_bit_exact(golden_file, tmp_path, name, to):
    golden, path, _ = golden_file(name)
    first = convert.load(path, num_heads=int(golden["num_heads"]))
    first.save(tmp_path / "model")
    # The name of a variant: a .pth of grouped weights says it nowhere else.
    written = tmp_path / f"again_{first.model.attention.variant}"
    written = written.with_suffix({"safetensors": ".safetensors", "released": ".pth"}[to])
    run("convert", "--source", tmp_path / "model", "--to", to, "--out", written)
    heads = None if to == "safetensors" else int(golden["num_heads"])
    again = convert.load(written, num_heads=heads)
    assert again.model == first.model
    jax.tree.map(np.testing.assert_array_equal, again.variables, first.variables)

    weights = helpers.golden_weights(golden)
    state = load_file(written) if to == "safetensors" else torch.load(written, weights_only=True)
    fused = any("qkv" in key for key in state)
    assert fused == (to == "safetensors" and name in ("timm_vit", "released_mhsa"))
    if fused == any("qkv" in key for key in weights):  # the same layout as it came in
        assert {k: tuple(x.shape) for k, x in state.items()} == {
            k: x.shape for k, x in weights.items()
        }
        for key, x in weights.items():
            np.testing.assert_array_equal(np.asarray(state[key]), x)


def test_memory_of_another_rule_survives_the_round_trip(trained, tmp_path):
    """The allocations of `trained` do not follow from its norms."""
    convert.export(trained, tmp_path / "a.safetensors")
    before, after = convert.load(trained), convert.load(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, after.variables, before.variables)
    assert after.description["class_names"] == ["a", "b", "c"]
    assert after.model == before.model


def test_exported_mha_has_timm_names(golden_file, tmp_path):
    golden, path, _ = golden_file("released_mhsa")
    convert.load(path, num_heads=6).save(tmp_path / "model")
    convert.export(tmp_path / "model", tmp_path / "a.safetensors")
    timm = helpers.golden_weights(helpers.load_golden("timm_vit"))
    state = load_file(tmp_path / "a.safetensors")
    assert {k: x.shape for k, x in state.items()} == {k: x.shape for k, x in timm.items()}
    qkv = state["blocks.1.attn.qkv.weight"]
    parts = [golden[f"weights/blocks.1.attn.{p}.weight"] for p in "qkv"]
    np.testing.assert_array_equal(qkv, np.concatenate(parts))
