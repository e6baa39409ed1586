"""A model.json that describes no model, or a larger one than the weights, is refused at once."""

import copy
import dataclasses
import itertools
import json
import time

import pytest
from convert_helpers import model_directory

from kdgqa_jax import attention, checkpoint, convert, model_json, options
from kdgqa_jax.errors import UserError
from kdgqa_jax.kernels import EXPANSIONS

VALUES = (None, True, -1, 0, 2.5, 10**12, float("nan"), "x", [], [1], ["a"], {}, {"a": 1})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model") / "model", "dgqa_ema", num_kv_heads=3)


def refusal(function, *arguments):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert time.process_time() - start < 5.0  # building such models takes minutes, or all memory
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


@pytest.mark.parametrize(
    ("option", "size"),
    [("depth", 3000), ("depth", 10**9), ("width", 10**9), ("mlp_width", 10**9),
     ("num_heads", 10**9), ("num_kv_heads", 10**15), ("num_classes", 10**9), ("patch_size", 10**9),
     ("representation_size", 10**30), ("reg_tokens", 10**9), ("head_width", 10**9)],
)  # fmt: skip
def test_a_larger_model_than_the_weights_is_refused_at_once(directory, tmp_path, option, size):
    weights = directory / checkpoint.WEIGHTS
    described = json.loads((directory / "model.json").read_text())
    described["model"][option] = size
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / checkpoint.WEIGHTS).write_bytes(weights.read_bytes())
    said = refusal(checkpoint.load_model, tmp_path)
    assert f"{option}={size} does not fit the weights beside it" in said


@pytest.mark.parametrize(
    ("option", "size"), [("depth", 3000), ("width", 6 * 10**8), ("depth", 10**9)]
)
def test_metadata_of_a_larger_model_is_refused_at_once(directory, tmp_path, option, size):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "a.safetensors"
    convert.export(directory, path)
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["kdgqa_jax"])
    metadata["model"][option] = size
    save_file(load_file(path), path, {"kdgqa_jax": json.dumps(metadata)})
    said = refusal(convert.load, path)
    assert f"metadata does not fit the weights: {option}={size} there" in said


def test_values_of_any_type_are_refused_in_a_sentence_or_read(directory, tmp_path):
    """In every field that is read."""
    sound = json.loads((directory / "model.json").read_text())
    places = [(name,) for name in sound] + [("model", name) for name in sound["model"]]
    places += [("preprocessing", name) for name in ("mean", "std", "crop_share", "resize", "new")]
    _, variables, _ = checkpoint.load_model(directory)
    arrays = {
        "params/blocks_0/mlp/fc1/kernel": variables["params"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    }
    refused = 0
    for place, value in itertools.product(places, VALUES):
        described = copy.deepcopy(sound)
        tree = described
        for name in place[:-1]:
            tree = tree[name]
        tree[place[-1]] = value
        path = tmp_path / "model.json"
        path.write_text(json.dumps(described))
        try:
            read = model_json.read(path)
            model_json.build(read, arrays, path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 150


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channels": "3"}, "channels='3'; expected a whole number"),
        ({"model": [1]}, r"model=\[1\]; expected a JSON object"),
        ({"class_names": ["a"]}, "1 class_names for 5 classes"),
        ({"class_names": [1, 2, 3, 4, 5]}, "class_names that are no strings"),
        ({"preprocessing": {"mean": "dark"}}, "images cannot be normalised by mean dark"),
        ({"preprocessing": {"blur": 3}}, "unknown preparation of images"),
    ],
)
def test_fields_that_cannot_be(directory, tmp_path, change, says):
    described = json.loads((directory / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**described, **change}))
    (tmp_path / checkpoint.WEIGHTS).write_bytes((directory / checkpoint.WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=says):
        checkpoint.load_model(tmp_path)


def test_directories_without_names_or_preprocessing_are_read(directory, tmp_path):
    described = json.loads((directory / "model.json").read_text())
    del described["class_names"], described["preprocessing"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / checkpoint.WEIGHTS).write_bytes((directory / checkpoint.WEIGHTS).read_bytes())
    assert checkpoint.load_model(tmp_path)[2]["preprocessing"] == {}


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_directories_of_earlier_versions_are_read(directory, tmp_path, expansion):
    """They list the options of all variants, and `implementation` was what is `expansion` now."""
    described = json.loads((directory / "model.json").read_text())
    known = attention.known_options()
    others = {n: f.default for n, f in known.items() if f.metadata["role"] == options.RULE}
    described["model"] = {**others, **described["model"], "implementation": expansion}
    (tmp_path / "model.json").write_text(json.dumps(described))
    (tmp_path / checkpoint.WEIGHTS).write_bytes((directory / checkpoint.WEIGHTS).read_bytes())
    before, after = (checkpoint.load_model(place)[0] for place in (directory, tmp_path))
    assert after == before.clone(
        attention=dataclasses.replace(before.attention, expansion=expansion)
    )
