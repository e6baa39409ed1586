"""Models as ONNX files. Those that need jax2onnx are skipped where it is not installed."""

import json
import pathlib
import sys
import types

import helpers
import numpy as np
import pytest
from test_exported import CLASSES, make_model  # noqa: F401

from kdgqa_jax import checkpoint, cli, exported_onnx, predict, tree_utils
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.errors import UserError


def export(path, out, *flags):
    return cli.main(["export", "--checkpoint", str(path), "--out", str(out), *flags])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_runtime_computes_what_jax_does(make_model, tmp_path, variant, stacked):  # noqa: F811
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = make_model(variant)
    if stacked:  # as training with scanned layers leaves it
        model, variables, description = checkpoint.load_model(path)
        description["model"]["scan_layers"] = True
        stacked_variables = tree_utils.in_layout(variables, stacked=True)
        checkpoint.save_model(tmp_path / "stacked", stacked_variables, description)
        path = tmp_path / "stacked"
    assert export(path, tmp_path / "m.onnx", "--allocation-scope", "example") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == CLASSES
    assert json.loads(about["preprocessing"])["mean"] == [0.4]
    model, variables, _ = checkpoint.load_model(path)
    for count in (1, 4):
        images = helpers.images(count)
        (found,) = session.run(["logits"], {"images": images})
        alone = (predict.predict_array(model, variables, image[None]).logits for image in images)
        helpers.assert_close(found, np.concatenate(list(alone)), 1e-5)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}])
def test_half_precision_becomes_float32(make_model, tmp_path, options):  # noqa: F811
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = make_model("gqa", **options)
    assert export(path, tmp_path / "m.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(["logits"], {"images": helpers.images(2)})
    model, variables, _ = checkpoint.load_model(path)
    helpers.assert_close(
        found, predict.predict_array(model, variables, helpers.images(2)).logits, 0.05
    )


class Standin:
    """Of the packages: a program, and a session that answers with `logits` of three images."""

    def __init__(self, logits):
        self.logits = logits
        self.metadata_props = types.SimpleNamespace(add=lambda **_: None)
        self.checker = types.SimpleNamespace(check_model=lambda program: None)

    def InferenceSession(self, content):
        return self

    def SerializeToString(self):
        return b"program"

    def to_onnx(self, *_, **__):
        return self

    def run(self, names, inputs):
        return [self.logits[: len(inputs["images"])]]


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (
            np.full((3, 5), 1e9, np.float32),
            r"of their size away, and 1e-04 was expected",
        ),
        (np.full((3, 5), np.nan, np.float32), "are nan of their size away"),
        (np.zeros((3, 1), np.float32), r"logits \(1, 1\) by ONNX Runtime, \(1, 5\) expected"),
    ],
)
def test_other_numbers_are_refused(make_model, tmp_path, monkeypatch, logits, says):  # noqa: F811
    for name in ("onnx", "onnxruntime", "jax2onnx"):
        monkeypatch.setitem(sys.modules, name, Standin(logits))
    with pytest.raises(UserError, match=f"does not become ONNX .*{says}"):
        exported_onnx.export(make_model("gqa"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_page_has_the_packages():
    page = pathlib.Path(__file__).parents[1] / "docs" / "export.md"
    assert exported_onnx.INSTALL in page.read_text()


def test_mistakes_are_one_sentence(make_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    def fails(*_, **__):
        raise NotImplementedError("no such\noperation")

    stand_in = types.SimpleNamespace(to_onnx=fails)
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "jax2onnx", stand_in)
    path, out = make_model("gqa"), tmp_path / "m.onnx"
    assert export(path, out, "--platforms", "cpu") == 1
    assert "--platforms belongs to .npz files" in capsys.readouterr().err
    assert export(path, out) == 1
    error = capsys.readouterr().err
    assert "does not become ONNX (no such operation)" in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert export(path, out) == 1
    error = capsys.readouterr().err
    assert exported_onnx.INSTALL in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
