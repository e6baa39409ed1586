"""Paths with an unknown scheme, and empty ones, are refused wherever a path can be given."""

import pathlib
import re
import sys
import types

import numpy as np
import pytest
from test_train import tiny_config

from kdgqa_jax import checkpoint, cli, convert, paths, predict, study, train
from kdgqa_jax import config as config_lib
from kdgqa_jax.data import sources
from kdgqa_jax.errors import UserError

OBJECTS = ("gs://bucket/x", "s3://bucket/x")
ELSEWHERE = ("hdfs://host/x", "file:///x", "abfs+ssl://x/y", "gs:/bucket/x", "gs:///x")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Nothing is left in the current directory, where such a path would be made a folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [*ELSEWHERE, "", pathlib.Path("gs://bucket/x"), "a\0b"])
def test_what_is_no_path(path):
    with pytest.raises(UserError, match=r"names no file|is not on the local file system"):
        paths.local(path)
    with pytest.raises(UserError, match=r"names no file|is neither on the local file system nor"):
        paths.place(path)


@pytest.mark.parametrize("path", OBJECTS)
def test_object_storage(path):
    """It is no local path; without its package, a sentence says which one is needed."""
    with pytest.raises(UserError, match="is not on the local file system"):
        paths.local(path)
    package = paths.STORES[path[:2]].package
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"'{path}' needs the package {package}: pip install"):
            paths.place(path)
    pytest.importorskip(package)
    for text in (path, f"{path}/"):
        assert str(paths.place(text) / "y") == f"{path}/y" and paths.is_remote(paths.place(text))
        assert str(paths.absolute(text)) == path and paths.place(text).name == "x"


@pytest.mark.parametrize("path", ["a:b/c", "./gs:/x", "/a:/b", "C:/x", "a b", "tfds:x", "."])
def test_local_paths_with_colons(path):
    assert paths.local(path) == pathlib.Path(path) == paths.place(path)
    assert not paths.is_remote(path)


REFUSED = r"'hdfs://host/x{}' is (not on|neither on) the local file system"
COMMANDS = {
    "--workdir": ["demo", "--workdir", "{}"],
    "--workdir of train": ["train", "--config", "testing", "--workdir", "{}"],
    "--workdir of study": ["study", "--config", "demo", "--workdir", "{}"],
    "--source": ["convert", "--out", "out", "--source", "{}"],
    "--out": ["convert", "--source", "source", "--out", "{}"],
    "--out of an export": ["convert", "--to", "safetensors", "--source", "s", "--out", "{}"],
    "--calibration": ["convert", "--out", "out", "--source", "source", "--calibration", "{}"],
    "--checkpoint": ["inspect", "--checkpoint", "{}"],
    "--images": ["predict", "--checkpoint", "model", "--images", "{}"],
    "--out of predict": ["predict", "--checkpoint", "m", "--images", "i", "--out", "{}"],
    "--out of evaluate": ["evaluate", "--checkpoint", "m", "--dataset", "digits", "--out", "{}"],
}
WITH_SCHEME_ONLY = {
    "--data-dir": ["prepare", "--dataset", "mnist", "--data-dir", "{}"],
    "--data-dir of demo": ["demo", "--workdir", "w", "--dataset", "mnist", "--data-dir", "{}"],
    "folder": ["prepare", "--dataset", "folder:{}"],
    "init": ["train", "--config", "testing", "--workdir", "w", "--config.init={}"],
    "data_dir": ["train", "--config=testing", "--workdir=w", "--config.data.data_dir={}"],
    "of a stage": ["demo", "--workdir=w", "--config.finetune.data.data_dir={}"],
    "data.name": ["train", "--config=testing", "--workdir=w", "--config.data.name=folder:{}"],
}


@pytest.mark.parametrize("arguments", [*COMMANDS.values(), *WITH_SCHEME_ONLY.values()])
def test_commands_refuse_other_storage(capsys, arguments):
    assert cli.main([a.format("hdfs://host/x") for a in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert re.search(REFUSED.format(""), error) and error.count("\n") == 1


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_an_empty_path(capsys, arguments):
    assert cli.main([a.format("") for a in arguments]) == 2
    error = capsys.readouterr().err
    assert "path '' names no file or directory" in error and error.count("\n") == 1


def demo():
    return config_lib.load_config("demo:dataset=digits")


CALLS = {
    "train_and_evaluate": lambda path: train.train_and_evaluate(tiny_config(), path),
    "init": lambda path: train.train_and_evaluate(tiny_config(init=path), "run"),
    "run_study": lambda path: study.run_study(demo(), path),
    "load_model": checkpoint.load_model,
    "save_model": lambda path: checkpoint.save_model(path, {}, {}),
    "convert.load": convert.load,
    "convert.export": lambda path: convert.export("model", path),
    "sources.load": lambda path: sources.load("mnist", path),
    "folder": lambda path: sources.load(f"folder:{path}"),
    "predict_files": lambda path: predict.predict_files("model", [path]),
    "predict.write": lambda path: predict.write(f"{path}.npy", [], np.zeros(0), []),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functions_refuse_other_storage(call, monkeypatch):
    if call is CALLS["predict_files"]:
        model = types.SimpleNamespace(image_shape=(8, 8))
        about = {"channels": 3, "class_names": [], "preprocessing": {}}
        monkeypatch.setattr(checkpoint, "load_model", lambda path: (model, {}, about))
    with pytest.raises(UserError, match=REFUSED.format(".*")):
        call("hdfs://host/x")
