"""Predictions of a model directory, from arrays and from image files of any kind."""

import csv
import functools
import io
import json

import helpers
import jax
import numpy as np
import pytest
from PIL import Image

from kdgqa_jax import checkpoint, cli, predict, vit
from kdgqa_jax.data import images
from kdgqa_jax.errors import UserError


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Write a model directory; it takes 8x8 images."""

    @functools.cache
    def make(channels=3, attention="kdgqa", **options):
        arguments = {"name": "mu/4", "depth": 2, "image_size": 8, "num_classes": 7,
                     "attention": attention, **options}  # fmt: skip
        model = vit.create(**arguments)
        init = helpers.fast_jit(lambda key: vit.init_variables(model, key, channels))
        variables = helpers.randomise(init(jax.random.key(0)))
        description = {
            "model": arguments,
            "channels": channels,
            "class_names": [f"kind {i}" for i in range(arguments["num_classes"])],
            "preprocessing": {"mean": [0.4] * channels, "std": [0.2] * channels},
        }
        path = tmp_path_factory.mktemp("model") / "model"
        checkpoint.save_model(path, variables, description)
        return path, model, variables

    return make


def test_batches_are_padded_without_a_trace(make_model, tmp_path):
    path, model, variables = make_model(attention="gqa")
    array = helpers.normal(0, 5, 8, 8, 3)
    np.save(tmp_path / "x.npy", array)
    assert cli.main(["predict", "--checkpoint", str(path), "--images", str(tmp_path / "x.npy"),
                     "--out", str(tmp_path / "y.npy"), "--batch-size", "2"]) == 0  # fmt: skip
    expected = helpers.apply(model, variables, array)
    logits = np.load(tmp_path / "y.npy")
    assert logits.dtype == np.float32
    helpers.assert_close(logits, expected, 1e-5)


def test_allocations_are_those_of_each_batch(make_model):
    _, model, variables = make_model()
    array = helpers.normal(0, 5, 8, 8, 3) * np.float32([1, 5, 2, 3, 9])[:, None, None, None]
    found = predict.predict_array(model, variables, array, batch_size=2)
    assert found.allocation.shape == (3, 2, 4)
    _, collections = helpers.apply(model, variables, array[4:], mutable=("grouping",))
    for i in range(2):
        alone = collections["grouping"][f"blocks_{i}"]["attn"]["allocation"]
        np.testing.assert_array_equal(found.allocation[2, i], alone)
    by_image = vit.create("mu/4", depth=2, image_size=8, num_classes=7, attention="kdgqa",
                          allocation_scope="example")  # fmt: skip
    assert predict.predict_array(by_image, variables, array, 2).allocation.shape == (5, 2, 4)


def test_images_that_are_not_finite_are_refused(make_model, tmp_path, capsys):
    """In batch scope they would change the predictions of those beside them."""
    path, model, variables = make_model()
    array = helpers.normal(0, 12, 8, 8, 3)
    array[3, 0, 0, 0], array[7, 7, 7, 2] = np.nan, -np.inf
    with pytest.raises(UserError, match=r"2 of 12 images hold NaN or infinity \(at index 3, 7\)"):
        predict.predict_array(model, variables, array)
    array[:11] = np.inf
    np.save(tmp_path / "x.npy", array)
    command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "x.npy")]
    assert cli.main([*command, "--out", str(tmp_path / "y.npy")]) == 1
    error = capsys.readouterr().err
    assert "11 of 12 images hold NaN or infinity (at index 0, 1, 2, 3, 4, 5, 6, 7, ...)" in error
    assert error.count("\n") == 1 and not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("stored", [np.asfortranarray, lambda x: x.astype(">f4")])
def test_arrays_of_any_layout_and_byte_order(make_model, tmp_path, stored):
    path, model, variables = make_model(attention="gqa")
    array = helpers.normal(0, 2, 8, 8, 3)
    np.save(tmp_path / "x.npy", stored(array))
    _, found, _ = predict.predict_files(path, [tmp_path / "x.npy"])
    np.testing.assert_array_equal(
        found.logits, predict.predict_array(model, variables, array).logits
    )


def save_images(folder):
    """One picture in many modes, and a JPEG that is to be turned."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    grey = rgb.convert("L")
    folder.mkdir()
    rgb.save(folder / "rgb.png")
    grey.save(folder / "grey.png")
    grey.convert("1").save(folder / "bits.png")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("YCbCr").save(folder / "ycc.tif")
    Image.fromarray(np.asarray(grey, np.uint16) << 8).save(folder / "grey16.png")
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(folder / "float.tif")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (folder / "deep").mkdir()
    rgb.save(folder / "deep" / "turned.png", exif=exif)
    (folder / "notes.txt").write_text("no image")
    return rgb, grey


@pytest.mark.parametrize("channels", [1, 3])
def test_image_files_of_any_mode(tmp_path, channels):
    rgb, grey = save_images(tmp_path / "images")
    plain = images.Preprocessing(interpolation="nearest")

    def read(name):
        return images.read(tmp_path / "images" / name, (12, 16), channels, plain)

    expected = np.asarray(rgb if channels == 3 else grey).reshape(12, 16, channels)
    same = ["rgb.png", "alpha.png"] if channels == 3 else ["rgb.png", "grey.png"]
    for name in same:
        np.testing.assert_array_equal(read(name), expected)
    for name in ("grey16.png", "float.tif", "grey.png"):  # nothing is clipped
        np.testing.assert_array_equal(read(name)[..., 0], np.asarray(grey))
    assert set(np.unique(read("bits.png"))) == {0, 255}
    for path in images.find([tmp_path / "images"]):
        pixels = images.read(path, (8, 8), channels, images.Preprocessing())
        assert pixels.shape == (8, 8, channels) and pixels.dtype == np.uint8
    turned = images.read(tmp_path / "images/deep/turned.png", (16, 12), channels, plain)
    np.testing.assert_array_equal(turned, np.rot90(expected, -1))


def test_folder_to_table_csv_and_json(make_model, tmp_path, capsys):
    path, _model, _variables = make_model()
    save_images(tmp_path / "images")
    command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "images"),
               "--top", "3", "--batch-size", "16"]  # fmt: skip
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "turned.png" in table and "kind " in table and "notes.txt" not in table
    assert "layer 1: query heads per key/value head" in table

    for suffix in (".csv", ".json", ".npy"):
        assert cli.main([*command, "--out", str(tmp_path / f"out{suffix}")]) == 0
    logits = np.load(tmp_path / "out.npy")
    records = json.loads((tmp_path / "out.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(records) == len(logits) == 10 and len(rows) == 30
    probabilities = np.asarray(jax.nn.softmax(logits))
    for i, record in enumerate(records):
        order = np.argsort(-probabilities[i])[:3]
        assert [c["name"] for c in record["classes"]] == [f"kind {k}" for k in order]
        shown = np.array([c["probability"] for c in record["classes"]])
        helpers.assert_close(shown, probabilities[i][order], 1e-5)
        assert rows[3 * i]["class"] == record["classes"][0]["name"]
        assert rows[3 * i]["image"] == record["image"]
    # The same as preparing the images by hand.
    names = [record["image"] for record in records]
    pixels = [np.asarray(Image.open(n).convert("RGB").resize((8, 8), 2)) for n in names
              if n.endswith(("rgb.png", "grey.png", "alpha.png"))]  # fmt: skip
    gqa = make_model(attention="gqa")
    _, found, _ = predict.predict_files(gqa[0], [n for n in names if n.endswith(
        ("rgb.png", "grey.png", "alpha.png"))])  # fmt: skip
    expected = helpers.apply(
        gqa[1], gqa[2], (np.stack(pixels) / np.float32(255) - 0.4) / np.float32(0.2)
    )
    helpers.assert_close(found.logits, expected, 1e-5)


def test_a_model_without_a_head_gives_features(make_model, tmp_path, capsys):
    path, model, variables = make_model(attention="gqa", num_classes=0)
    array = helpers.normal(0, 2, 8, 8, 3)
    np.save(tmp_path / "x.npy", array)
    command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "x.npy")]
    assert cli.main([*command, "--out", str(tmp_path / "y.npy")]) == 0
    features = np.load(tmp_path / "y.npy")
    helpers.assert_close(features, helpers.apply(model, variables, array), 1e-5)
    assert features.shape == (2, 64)
    assert cli.main(command) == 1
    assert "the model has no class head; --out FILE.npy" in capsys.readouterr().err


def test_inspect(make_model, capsys):
    path, _, _ = make_model(attention="dgqa_ema", num_kv_heads=2)
    assert cli.main(["inspect", "--checkpoint", str(path)]) == 0
    shown = capsys.readouterr().out
    for text in ("dgqa_ema", "8x8 px, channels: 3", "7: kind 0, kind 1, kind 2, ...", "4 4"):
        assert text in shown


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 8, 8, 3)), "float64 (2, 8, 8, 3); expected normalised float32 images"),
        (np.zeros((8, 8, 3), np.float32), "float32 (8, 8, 3); expected"),
        (np.zeros((2, 3, 8, 8), np.float32), "the model takes ('n', 8, 8, 3)"),
        (np.zeros((0, 8, 8, 3), np.float32), "images (0, 8, 8, 3)"),
        (np.array([{}], dtype=object), "not a NumPy array that can be read"),
        (np.zeros((2, 8, 8, 3), np.float16), "float16 (2, 8, 8, 3); expected normalised float32"),
        (np.zeros((2, 8, 8, 3), np.uint8), "uint8 (2, 8, 8, 3); expected normalised float32"),
    ],
)
def test_arrays_that_do_not_fit(make_model, tmp_path, capsys, array, says):
    path, _, _ = make_model()
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    out = tmp_path / "y.npy"
    command = ["predict", "--checkpoint", str(path), "--images", str(tmp_path / "x.npy")]
    assert cli.main([*command, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()


def archive(path):
    content = io.BytesIO()
    np.savez(content, x=np.zeros(3))
    path.write_bytes(content.getvalue())


def huge(path):
    """A header that promises 8 PiB."""
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (2**51,)}
    np.lib.format.write_array_header_1_0(header, fields)
    path.write_bytes(header.getvalue())


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (archive, "x.npy: an archive; expected"),
        (lambda path: path.write_bytes(b""), "not a NumPy array that can be read"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1\0\xff\xff{"), "not a NumPy array that can"),
        (lambda path: path.mkdir(), "not a NumPy array that can be read (Is a directory)"),
        (huge, "not a NumPy array that can be read"),
    ],
    ids=["archive", "empty", "cut", "folder", "huge"],
)
def test_files_that_hold_no_array(make_model, tmp_path, write, says):
    write(tmp_path / "x.npy")
    with pytest.raises(UserError) as error:
        predict.read_array(tmp_path / "x.npy", (8, 8, 3))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images", "{tmp}/none.png"], "none.png not found"),
        (["--images", "{tmp}/text.png"], "text.png: not an image that can be read"),
        (["--images", "{tmp}/cut.png"], "cut.png: not an image that can be read"),
        (["--images", "{tmp}/empty"], "empty: holds no images"),
        (["--images", "{tmp}/a.npy", "{tmp}/b.npy"], "give one .npy file"),
        (["--images", "{tmp}/a.npz"], "a.npz: not an image that can be read (of no known format)"),
        (["--images", "{tmp}/._a.png"], "._a.png: not an image that can be read"),
        (["--images", "{tmp}/new\nline.png"], "new\\nline.png: not an image that can be read"),
        (["--images", "{tmp}/text.png", "--out", "{tmp}/a.txt"], "a.txt: unknown kind of file"),
        (["--images", "{tmp}/text.png", "--batch-size", "0"], "--batch-size: '0' must be a whole"),
        (["--images", "{tmp}/fine.png", "--top", "0"], "--top: '0' must be a whole number"),
        (["--images", "{tmp}/text.png", "--checkpoint", "{tmp}"], "is not a model directory"),
    ],
)
def test_images_that_cannot_be_read(make_model, tmp_path, capsys, arguments, says):
    path, _, _ = make_model()
    for name in ("text.png", "._a.png", "new\nline.png"):
        (tmp_path / name).write_text("hello")
    archive(tmp_path / "a.npz")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("fine.png", "cut.png"):
        Image.fromarray(noise).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert cli.main(["predict", "--checkpoint", str(path), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
