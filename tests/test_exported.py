"""Exported functions: the numbers of `kdgqa predict`, in a process with JAX and NumPy alone."""

import json
import pathlib
import re
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kdgqa_jax import checkpoint, cli, exported, predict, vit
from kdgqa_jax.errors import UserError

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "export.md"
CLASSES = [f"kind {i}" for i in range(5)]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Write a model directory of grey 8x8 images."""

    def make(attention, **options):
        model = helpers.tiny_vit(attention, **options)
        description = {
            "model": {"name": "custom", **vit.arguments(model)},
            "channels": 1,
            "class_names": CLASSES,
            "preprocessing": {"mean": [0.4], "std": [0.2]},
        }
        path = tmp_path_factory.mktemp("model") / "model"
        drawn, shapes = helpers.vit_variables(model), vit.variable_shapes(model, 1)
        variables = jax.tree.map(lambda x, shape: x.astype(shape.dtype), drawn, shapes)
        checkpoint.save_model(path, variables, description)
        return path

    return make


@pytest.fixture(scope="module")
def kdgqa(make_model, tmp_path_factory):
    """(a model directory that groups by example, the function that it was exported to)."""
    path = make_model("kdgqa", allocation_scope="example")
    out = tmp_path_factory.mktemp("exported") / "model.npz"
    assert cli.main(["export", "--checkpoint", str(path), "--out", str(out)]) == 0
    return path, out


def predicted(*flags, out):
    assert cli.main(["predict", *map(str, flags), "--out", str(out)]) == 0
    return np.load(out)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_logits_are_those_of_predict_bit_for_bit(kdgqa, tmp_path, count):
    path, file = kdgqa
    contrast = np.linspace(1, 4, count, dtype=np.float32).reshape(-1, 1, 1, 1)
    np.save(tmp_path / "x.npy", helpers.images(count) * contrast)
    images = ("--images", tmp_path / "x.npy")
    expected = predicted("--checkpoint", path, *images, out=tmp_path / "a.npy")
    found = predicted("--exported", file, *images, out=tmp_path / "b.npy")
    assert found.shape == (count, 5) and np.ptp(found) > 0.1
    np.testing.assert_array_equal(found, expected)


def test_a_fresh_process_needs_jax_and_numpy_alone(kdgqa, tmp_path):
    """By the lines of docs/export.md; nothing that is no part of jax can be imported."""
    path, file = kdgqa
    (lines,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    lines = lines.replace('"vit.npz"', repr(str(file))).replace("np.zeros(", "np.ones(")
    blocked = (
        "flax",
        "kdgqa_jax",
        "optax",
        "orbax",
        "safetensors",
        "PIL",
        "rich",
        "ml_collections",
    )
    block = f"import sys\nfor name in {blocked}:\n    sys.modules[name] = None\n"
    code = f"{block}{lines}\nprint(logits.tolist())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=helpers.child_environment(),
    )
    assert result.returncode == 0, result.stderr
    model, variables, _ = checkpoint.load_model(path)
    expected = predict.predict_array(model, variables, np.ones((3, 8, 8, 1), np.float32)).logits
    np.testing.assert_array_equal(np.float32(json.loads(result.stdout)), expected)


def test_the_file_says_what_it_is_and_serves_all_platforms(kdgqa):
    path, file = kdgqa
    model = exported.load(file)
    assert model.metadata["platforms"] == ["cpu", "cuda", "tpu"]
    assert model.metadata["attention"] == "xla" and model.image_shape == (8, 8, 1)
    assert model.metadata["class_names"] == CLASSES
    assert model.metadata["versions"]["jax"] == jax.__version__
    arrays = checkpoint.flatten_dict(checkpoint.load_model(path)[1], sep="/")
    assert arrays.keys() == model.arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(model.arrays[name], x)


def test_no_batch_mate_matters(kdgqa):
    model = exported.load(kdgqa[1])
    images = helpers.images(3)
    others = np.concatenate([images[:1], 7 * images[1:]])
    np.testing.assert_array_equal(model(images)[0], model(others)[0])
    with pytest.raises(UserError, match=r"images float32 \(3, 4, 4, 1\); .* \('n', 8, 8, 1\)"):
        model(images[:, :4, :4])


def test_a_model_that_groups_by_batches_is_refused_or_changed_by_name(make_model, tmp_path, capsys):
    path = make_model("kdgqa")
    out = tmp_path / "m.npz"
    command = ["export", "--checkpoint", str(path), "--out", str(out), "--platforms", "cpu"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "groups its heads by all images of a batch" in error and error.count("\n") == 1
    assert "--allocation-scope example" in error and not out.exists()
    assert cli.main([*command, "--allocation-scope", "example"]) == 0
    loaded = exported.load(out)
    assert loaded.metadata["model"]["allocation_scope"] == "example"
    model, variables, _ = checkpoint.load_model(path)
    images = helpers.images(2)
    alone = [predict.predict_array(model, variables, images[i : i + 1]).logits for i in range(2)]
    helpers.assert_close(loaded(images), np.concatenate(alone), 1e-5)


def test_image_files_and_classes(kdgqa, tmp_path, capsys):
    path, file = kdgqa
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    shown = []
    for source in (["--checkpoint", str(path)], ["--exported", str(file)]):
        assert cli.main(["predict", *source, "--images", str(tmp_path), "--top", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert "kind" in shown[1] and shown[0].startswith(shown[1]) and "layer 0" in shown[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "--checkpoint", "{model}", "--out", "m.txt"], "m.txt: give a name in .npz"),
        (["export", "--checkpoint", "{model}", "--out", "m.npz", "--platforms", "gpu"],
         "unknown platform 'gpu'"),
        (["export", "--checkpoint", "{model}", "--out", "m.npz", "--platforms", ","],
         "no platform to export for"),
        (["predict", "--exported", "{tmp}/none.npz", "--images", "x.npy"], "none.npz not found"),
        (["predict", "--exported", "{tmp}/text.npz", "--images", "x.npy"],
         "text.npz is not an exported function, or a damaged one"),
        (["predict", "--exported", "{tmp}/arrays.npz", "--images", "x.npy"],
         "arrays.npz is not an exported function, or a damaged one"),
        (["predict", "--exported", "{tmp}/program.npz", "--images", "x.npy"],
         "cannot be read by jax"),
        (["predict", "--exported", "{file}", "--images", "x.npy", "--features", "--out", "o.npy"],
         "--features belongs to --checkpoint"),
        (["predict", "--exported", "{file}", "--checkpoint", "{model}", "--images", "x.npy"],
         "not allowed with argument"),
        (["predict", "--images", "x.npy"], "one of the arguments --checkpoint --exported is"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(kdgqa, tmp_path, capsys, monkeypatch, arguments, says):
    path, file = kdgqa
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with np.load(file) as archive:
        members = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "program.npz", **{**members, "function": np.zeros(9, np.uint8)})
    before = sorted(tmp_path.iterdir())
    names = {"{model}": str(path), "{file}": str(file), "{tmp}": str(tmp_path)}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    assert cli.main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_platform_that_it_is_not_for_is_a_sentence(make_model, tmp_path):
    path = make_model("gqa")
    exported.export(path, tmp_path / "m.npz", ["tpu"])
    with pytest.raises(UserError, match=r"is for tpu, and this process runs on cpu"):
        exported.load(tmp_path / "m.npz")


def test_noise_in_evaluation_is_refused(make_model):
    model = helpers.tiny_vit("pgqa", noise_at_eval=True)
    with pytest.raises(UserError, match="noise in evaluation"):
        exported.independent_model(model, "it")
    assert exported.independent_model(helpers.tiny_vit("dgqa_ema"), "it").attention.has_memory


def test_bfloat16_goes_through_its_bits(make_model, tmp_path):
    path = make_model("dgqa_diff", param_dtype="bfloat16")
    exported.export(path, tmp_path / "m.npz", ["cpu"])
    loaded = exported.load(tmp_path / "m.npz")
    assert loaded.arrays["params/head/kernel"].dtype == np.uint16
    model, variables, _ = checkpoint.load_model(path)
    assert variables["params"]["head"]["kernel"].dtype == jnp.bfloat16
    images = helpers.images(2)
    expected = predict.predict_array(model, variables, images).logits
    np.testing.assert_array_equal(loaded(images), expected)
