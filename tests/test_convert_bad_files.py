"""Whatever is wrong with a checkpoint: one sentence, nothing written, nothing run."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import helpers
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kdgqa_jax import checkpoint, cli, convert, vit
from kdgqa_jax.errors import UserError


@pytest.fixture
def weights(golden):
    return helpers.golden_weights(golden("timm_vit"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A directory that transformers wrote."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=48,
        image_size=16, patch_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hf")
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def refused(capsys, tmp_path, source, *arguments):
    """What `kdgqa convert` says when it refuses; it has to say it as it should."""
    out = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert cli.main(["convert", "--source", str(source), "--out", str(out), *arguments]) in (1, 2)
    shown = capsys.readouterr()
    assert shown.err.startswith("kdgqa convert: ") and shown.err.count("\n") == 1
    assert "Traceback" not in shown.err and "--debug shows" not in shown.err
    assert sorted(tmp_path.iterdir()) == before
    return shown.err


def truncated(path, weights):
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])


def truncated_pickle(path, weights):
    torch.save({name: torch.from_numpy(x) for name, x in weights.items()}, path)
    path.write_bytes(path.read_bytes()[:5000])


def objects(path, weights):
    with path.open("wb") as file:
        np.savez(file, cls=np.array([{"a": 1}], dtype=object))


def no_weights(path, weights):
    path.mkdir()
    (path / "config.json").write_text("{}")


def several(path, weights):
    path.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(weights, path / name)


def resnet(path, weights):
    save_file({"conv1.weight": np.zeros((8, 3, 7, 7), np.float32)}, path)


def bad_config(path, weights):
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path, _: None, "not found"),
        (lambda path, _: path.write_bytes(b""), "empty file"),
        (lambda path, _: path.write_bytes(b"hello, this is no checkpoint"), "unknown kind of file"),
        (truncated, "damaged, or not a safetensors file"),
        (truncated_pickle, "damaged"),
        (objects, "damaged, or not a NumPy .npz file (ValueError: Object arrays cannot be loaded"),
        (no_weights, "holds no weights; expected model.safetensors or pytorch_model.bin"),
        (several, "holds several files of weights (a.safetensors, b.safetensors); name one"),
        (resnet, "unknown layout; tried timm, released PyTorch code, Hugging Face transformers 4"),
        (bad_config, "config.json is damaged"),
        (lambda path, _: torch.save([1, 2], path), "not a state dict"),
    ],
)
def test_files_that_are_no_checkpoint(capsys, tmp_path, weights, write, says):
    source = tmp_path / "source"
    write(source, weights)
    assert says in refused(capsys, tmp_path, source)


def test_all_missing_and_left_over_names_are_listed_at_once(capsys, tmp_path, weights):
    for name in ("norm.weight", "blocks.1.mlp.fc2.bias"):
        del weights[name]
    weights |= {"extra.a": np.zeros(3, np.float32), "blocks.0.ls1.gamma": np.zeros(48, np.float32)}
    save_file(weights, tmp_path / "a.safetensors")
    said = refused(capsys, tmp_path, tmp_path / "a.safetensors", "--num-heads", "6")
    assert (
        "missing (--allow-missing NAME initialises it): blocks.1.mlp.fc2.bias, norm.weight;" in said
    )
    assert "left over (--allow-left-over NAME ignores it): blocks.0.ls1.gamma, extra.a" in said

    allowed = convert.load(
        tmp_path / "a.safetensors",
        num_heads=6,
        allow_missing=["norm.*", "blocks.1.mlp.fc2.bias"],
        allow_left_over=["extra.a", "*.ls1.gamma"],
    )
    np.testing.assert_array_equal(allowed.variables["params"]["norm"]["scale"], np.ones(48))
    rows = allowed.report.rows()
    assert ("", "", "extra.a", "left over, as allowed") in rows
    assert ("norm/scale", "48", "", "missing, as allowed: newly initialised") in rows


def test_all_wrong_shapes_are_listed_at_once(capsys, tmp_path, weights):
    weights["blocks.0.attn.proj.weight"] = np.zeros((48, 40), np.float32)
    weights["norm.bias"] = np.zeros(47, np.float32)
    weights["blocks.1.attn.qkv.bias"] = np.zeros((144, 1), np.float32)  # of the same size
    save_file(weights, tmp_path / "a.safetensors")
    said = refused(capsys, tmp_path, tmp_path / "a.safetensors", "--num-heads", "6")
    assert "blocks.0.attn.proj.weight (48, 40) does not give blocks_0/attn/out/kernel" in said
    assert "norm.bias (47,) does not give norm/bias (48,)" in said
    assert "blocks.1.attn.qkv.bias (144, 1) does not give blocks_1/attn/key/bias" in said


def test_nan_is_named_and_can_be_allowed(capsys, tmp_path, weights):
    weights["blocks.1.mlp.fc1.weight"] = weights["blocks.1.mlp.fc1.weight"].copy()
    weights["blocks.1.mlp.fc1.weight"][3, 4] = np.nan
    save_file(weights, tmp_path / "a.safetensors")
    said = refused(capsys, tmp_path, tmp_path / "a.safetensors", "--num-heads", "6")
    assert "NaN or infinity in blocks.1.mlp.fc1.weight; --allow-nan" in said
    convert.load(tmp_path / "a.safetensors", num_heads=6, allow_nan=True)


def test_arrays_of_whole_numbers_are_refused(capsys, tmp_path, weights):
    weights["norm.bias"] = np.zeros(48, np.int32)
    save_file(weights, tmp_path / "a.safetensors")
    said = refused(capsys, tmp_path, tmp_path / "a.safetensors", "--num-heads", "6")
    assert (
        "not of floating point numbers (quantized? save them dequantized): norm.bias (int32)"
        in said
    )


class _Code:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(capsys, tmp_path, weights, zipped):
    trap = tmp_path / "trap"
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    source = tmp_path / "a.pth"
    torch.save(
        {"model": tensors, "args": _Code(trap)}, source, _use_new_zipfile_serialization=zipped
    )
    said = refused(capsys, tmp_path, source)
    assert "refused, not run: beside tensors it holds" in said and "mkdir" in said
    assert not trap.exists()
    with pytest.raises((pickle.UnpicklingError, FileExistsError)):  # the trap is a real one
        torch.load(source, weights_only=False)
        torch.load(source, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "how many query heads a model of width 48 has is not known"),
        (["--num-heads", "7"], "width 48 is not a multiple of 7 heads"),
        (
            ["--num-heads", "6", "--attention", "gqa", "--num-kv-heads", "4"],
            "does not divide the 6",
        ),
        (["--num-heads", "6", "--attention", "gqq"], "unknown attention variant 'gqq'"),
        (["--num-heads", "6", "--attention", "gqa", "--pooling", "max"], "unknown pooling 'max'"),
        (["--num-heads", "6", "--image-size", "30"], "multiples of the patch size 8"),
        (["--num-heads", "6", "--num-classes", "-1"], "must be a whole number, at least 0"),
        (["--num-heads", "6", "--channels", "0"], "must be a whole number, at least 1"),
        (["--num-heads", "6", "--mean", "1,2"], "mean of images has 2 values for 3 channels"),
        (["--num-heds", "6"], "unknown argument '--num-heds': did you mean '--num-heads'?"),
        (["--to", "onnx"], "unknown export 'onnx'"),
        (["--to", "released", "--num-classes", "0"], "--num-classes belong to a conversion"),
        (["--num-heads", "6", "--std", "0"], "images cannot be normalised by mean"),
        (["--num-heads", "6", "--pooling", "max"], "unknown pooling 'max'"),
        (["--num-heads", "6", "--num-kv-heads", "0"], "must be a whole number, at least 1"),
        (["--num-heads", "0"], "must be a whole number, at least 1"),
        (["--to", "released", "--attention", "gqa"], "--attention belong to a conversion"),
    ],
)
def test_requests_that_do_not_fit(capsys, tmp_path, weights, arguments, says):
    save_file(weights, tmp_path / "a.safetensors")
    assert says in refused(capsys, tmp_path, tmp_path / "a.safetensors", *arguments)


def test_what_exists_is_left_alone(capsys, tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    said = refused(capsys, tmp_path, tmp_path / "a.safetensors", "--num-heads", "6")
    assert "out exists already" in said
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_an_empty_place_is_not_the_current_directory(capsys, tmp_path, weights, monkeypatch):
    save_file(weights, tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "--source", "a.safetensors", "--num-heads", "6", "--out", ""]) == 2
    assert "names no file or directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_of_someone_else_is_never_replaced(sound, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("precious")
    _, variables, description = checkpoint.load_model(sound / "ours")
    with pytest.raises(UserError, match="holds something else than a model"):
        checkpoint.save_model(tmp_path / "model", variables, description)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers=5 there, 1 in the weights"),
        ({"patch_size": 4}, "patch_size=4 there, 8 in the weights"),
        ({"image_size": 64}, "4 patches of 8 px does not fit the image size 64"),
        ({"image_size": "big"}, "image_size='big' must be a side in pixels, or [height, width]"),
        ({"hidden_act": "mish"}, "hidden_act='mish'; the model here has one of gelu, gelu_python"),
        ({"num_attention_heads": "six"}, "num_attention_heads='six' must be a whole number"),
        ({"num_attention_heads": 6.7}, "num_attention_heads=6.7 must be a whole number"),
        ({"image_size": 20}, "4 patches of 8 px does not fit the image size 20"),
        ({"layer_norm_eps": -1}, "layer_norm_eps=-1 must be a number from 0 to 1"),
        ({"model_type": "dinov2"}, "model_type='dinov2'; its computation is not known to be that"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(capsys, tmp_path, hf, lie, says):
    folder = tmp_path / "a"
    shutil.copytree(hf, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **lie}))
    assert says in refused(capsys, tmp_path, folder)


def test_heads_are_those_of_the_config(capsys, tmp_path, hf):
    assert "has 6 query heads, not 3" in refused(capsys, tmp_path, hf, "--num-heads", "3")


def test_shards_without_an_index_are_refused(capsys, tmp_path, weights):
    (tmp_path / "a").mkdir()
    for i in (1, 2):
        save_file(weights, tmp_path / "a" / f"model-0000{i}-of-00002.safetensors")
    (tmp_path / "a" / "model.safetensors.index.json").write_text("{}")
    assert "no index of shards" in refused(capsys, tmp_path, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    said = refused(capsys, tmp_path, tmp_path / "a")
    assert "several files of weights (model-00001-of-00002.safetensors" in said


def test_others_may_read_what_was_written(sound):
    modes = [(sound / "ours" / name).stat().st_mode for name in ("model.json", checkpoint.WEIGHTS)]
    assert modes[0] == modes[1]


def test_a_place_that_cannot_be_written(capsys, tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    arguments = ["--source", str(tmp_path / "a.safetensors"), "--num-heads", "6", "--out", out]
    assert cli.main(["convert", *arguments]) == 1
    assert "out cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_name_on_the_hub_without_a_network(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refused(capsys, tmp_path, "hf:someone/nothing")
    assert "hf:someone/nothing could not be fetched" in said and "is not in its cache" in said


# --- sound ones ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with a sound model directory, `ours`."""
    folder = tmp_path_factory.mktemp("sound")
    options = {"name": "custom/4", "width": 8, "depth": 1, "num_heads": 2, "mlp_width": 8,
               "image_size": 8, "num_classes": 3, "attention": "mha"}  # fmt: skip
    variables = helpers.randomise(vit.init_variables(vit.create(**options), jax.random.key(0)))
    description = {"model": options, "channels": 3, "class_names": ["a", "b", "c"],
                   "preprocessing": {"mean": 0.5, "std": 0.5}}  # fmt: skip
    checkpoint.save_model(folder / "ours", variables, description)
    return folder


# --- kills --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_conversion_leaves_nothing_or_all(tmp_path):
    model = vit.create("custom/4", width=256, depth=12, num_heads=4, mlp_width=1024, image_size=8,
                       num_classes=3)  # fmt: skip
    params = vit.init_variables(model, jax.random.key(0))
    save_file(convert.to_pytorch(model, params), tmp_path / "a.safetensors")
    out = tmp_path / "out"
    command = [
        str(pathlib.Path(sys.executable).parent / "kdgqa"), "convert", "--num-heads", "4",
        "--source", str(tmp_path / "a.safetensors"), "--out", str(out),
        "--attention", "gqa",
    ]  # fmt: skip
    partial, killed = tmp_path / ".out.partial", 0
    for seen in (partial, partial / "model.json", partial / "weights.safetensors", out):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not seen.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            break
    assert killed
    if not out.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    loaded, variables, description = checkpoint.load_model(out)
    assert loaded.attention.num_kv_heads == 2 and description["converted"]
    np.testing.assert_array_equal(
        variables["params"]["blocks_11"]["mlp"]["fc2"]["kernel"],
        params["params"]["blocks_11"]["mlp"]["fc2"]["kernel"],
    )
    assert not partial.exists()


def test_damaged_directory_of_ours_is_named(sound, tmp_path):
    subprocess.run(["cp", "-r", sound / "ours", tmp_path / "a"], check=True)
    description = json.loads((tmp_path / "a" / "model.json").read_text())
    description["model"]["width"] = "wide"
    (tmp_path / "a" / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="model option width='wide' must be of type int"):
        checkpoint.load_model(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        archive.writestr("readme.txt", "neither torch nor numpy")
    with pytest.raises(UserError, match="damaged, or not a PyTorch file"):
        convert.load(tmp_path / "b")
