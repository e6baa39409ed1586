"""Features instead of logits, from models with a head and without."""

import helpers
import jax
import numpy as np
import pytest
from convert_helpers import model_directory
from PIL import Image

from kdgqa_jax import checkpoint, cli, predict, vit
from kdgqa_jax.errors import UserError


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "kdgqa", "representation_size": 24},
        {"attention": "gqa", "num_classes": 0, "pool": "avg", "reg_tokens": 2},
        {"attention": "gqa", "pool": "map", "class_token": False, "final_norm": False},
    ],
    ids=["kdgqa", "no_head", "map"],
)
def test_features_of_any_model(tmp_path, options):
    """Pooled ones give the logits by the head alone; tokens give them by pool and head."""
    path = model_directory(tmp_path / "model", **options)
    model, variables, _ = checkpoint.load_model(path)
    np.save(tmp_path / "x.npy", helpers.images(5))
    found = []
    for flags in ([], ["--features"], ["--features", "tokens"]):
        out = tmp_path / f"{len(flags)}.npy"
        command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "x.npy")]
        assert cli.main([*command, *flags, "--out", str(out), "--batch-size", "5"]) == 0
        found.append(np.load(out))
        assert found[-1].dtype == np.float32
    logits, pooled, tokens = found
    length = model.grid[0] * model.grid[1] + model.num_prefix_tokens
    assert pooled.shape == (5, 48) and tokens.shape == (5, length, 48)

    def dense(x, name):
        layer = jax.tree.map(np.float64, variables["params"][name])
        return x @ layer["kernel"] + layer["bias"]

    x = np.tanh(dense(pooled, "pre_logits")) if model.representation_size else pooled
    helpers.assert_close(dense(x, "head") if model.num_classes else x, logits, 1e-5)
    helpers.assert_close(helpers.apply(model, variables, tokens, method="pooled"), pooled, 1e-5)
    assert np.ptp(tokens[:, 0] - tokens[:, 1]) > 0.1


def test_features_of_image_files_are_padded_without_a_trace(tmp_path):
    path = model_directory(tmp_path / "model", "gqa")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    names, found, _ = predict.predict_files(path, [tmp_path / "images"], 4, "tokens")
    alone = predict.predict_files(path, [tmp_path / "images" / "4.png"], 4, "tokens")[1]
    assert found.output.shape == (len(names), 5, 48) == (5, 5, 48)
    helpers.assert_close(found.output[4:], alone.output, 1e-5)


def test_pooled_features_are_those_that_the_head_gets():
    """In half precision, too, where pooling in float32 would give others."""
    model = helpers.tiny_vit("gqa", pool="avg", dtype="bfloat16")
    params = helpers.vit_variables(model)["params"]
    headless = {name: x for name, x in params.items() if name != "head"}
    images = helpers.images(2)
    expected = predict.predict_array(model.clone(num_classes=0), {"params": headless}, images)
    found = predict.predict_array(model, {"params": params}, images, features="pooled")
    np.testing.assert_array_equal(found.output, expected.output)


@pytest.mark.parametrize(
    ("classes", "flags", "says"),
    [
        (5, ["--features"], "--features needs --out FILE.npy"),
        (5, ["--features", "tokens", "--out", "a.csv"], "--features needs --out FILE.npy"),
        (5, ["--features", "token", "--out", "a.npy"], "invalid choice: 'token'"),
        (0, ["--out", "a.json"], "no class head; --out FILE.npy"),
        (0, [], "no class head; --out FILE.npy"),
    ],
)
def test_what_does_not_fit_is_said_before_images_are_read(tmp_path, capsys, classes, flags, says):
    path = model_directory(tmp_path / "model", "gqa", num_classes=classes, depth=1)
    flags = [str(tmp_path / flag) if flag.startswith("a.") else flag for flag in flags]
    command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "none")]
    assert cli.main([*command, *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and [*tmp_path.iterdir()] == [path]


def test_the_command_line_knows_all_features():
    actions = cli.build_parsers()["predict"]._actions
    (choices,) = (action.choices for action in actions if action.dest == "features")
    assert tuple(choices) == tuple(predict.FEATURES)
    model = vit.create("mu/4", image_size=8, depth=1)
    with pytest.raises(UserError, match="unknown features 'token': did you mean 'tokens'"):
        predict.predict_array(model, {}, helpers.images(1), features="token")
