"""A spread of timm's architectures gives timm's logits, recorded ones and those of timm itself."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import sweep_timm
from safetensors.numpy import save_file

from kdgqa_jax import convert
from kdgqa_jax.convert.sources import timm_architectures
from kdgqa_jax.errors import UserError

GOLDEN_FILE = pathlib.Path(__file__).parent / "goldens" / "timm_architectures.json"
GOLDENS = json.loads(GOLDEN_FILE.read_text())


@pytest.fixture
def directory(tmp_path):
    """Writes what timm would have: (name, changes of config.json, of the weights) -> its place."""

    def write(name, weights=None, **changes):
        golden = GOLDENS[name]
        arrays = sweep_timm.weights(golden["shapes"]) if weights is None else weights
        save_file(arrays, tmp_path / "model.safetensors")
        config = {**golden["config"], **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("name", sweep_timm.SPREAD)
def test_logits_are_those_that_timm_gave(directory, name):
    golden = GOLDENS[name]
    images = sweep_timm.images_of(golden["side"])
    outcome = sweep_timm.compared(directory(name), images, np.float32(golden["logits"]))
    assert outcome[0] == "equal", outcome


def test_timm_itself_gives_the_same(tmp_path):
    timm = sweep_timm.import_timm()
    if timm is None:
        pytest.skip("timm is not installed")
    for name, outcome, said in sweep_timm.sweep(timm, sweep_timm.SPREAD):
        assert outcome == "equal", (name, said)


@pytest.mark.parametrize("name", sweep_timm.SPREAD)
def test_bare_weights_of_more_than_a_plain_vit_need_the_name(directory, name):
    """A plain one loads; others are ambiguous, and give the same model by --arch."""
    place = directory(name)
    with_config = convert.load(place)
    (place / "config.json").unlink()
    file = place / "model.safetensors"
    heads = with_config.model.attention.num_heads
    by_name = convert.load(file, arch=name, num_heads=heads)
    assert by_name.model == with_config.model
    structure = ("vit_tiny", "deit_tiny_distilled", "eva_", "vit_base_patch16_224_miil")
    if name.startswith(structure):
        assert convert.load(file, num_heads=heads).model == with_config.model
    else:
        with pytest.raises(UserError) as error:
            convert.load(file, num_heads=heads)
        assert "\n" not in str(error.value)


def test_arch_is_refused_where_something_says_what_the_model_is(directory):
    place = directory("vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"config\.json says what the model is; leave --arch out"):
        convert.load(place, arch="vit_tiny_patch16_224")


def test_a_name_of_another_architecture_does_not_fit(directory):
    place = directory("vit_small_patch14_dinov2")
    (place / "config.json").unlink()
    with pytest.raises(UserError, match=r"--arch does not fit model\.safetensors: pre_norm=True"):
        convert.load(place / "model.safetensors", arch="vit_base_patch16_clip_224", num_heads=6)


def test_the_spread_reaches_most_rows_of_the_table():
    """A spread is of different kinds."""
    table = [pattern for pattern, _ in timm_architectures._TABLE]
    rows = {next(i for i, p in enumerate(table) if re.fullmatch(p, n)) for n in sweep_timm.SPREAD}
    assert len(rows) >= 25


@pytest.mark.parametrize("name", sweep_timm.SPREAD)
def test_exports_hold_what_the_target_can_hold(directory, tmp_path_factory, name):
    """Under timm's names bit for bit as they came, packed gates apart."""
    place = directory(name)
    out = tmp_path_factory.mktemp("out")
    converted = convert.load(place)
    converted.save(out / "model")
    convert.export(out / "model", out / "a.safetensors")
    again = convert.load(out / "a.safetensors")
    assert again.model == converted.model
    jax.tree.map(np.testing.assert_array_equal, again.variables, converted.variables)
    written = convert.to_pytorch(converted.model, converted.variables, "timm")
    arrays = sweep_timm.weights(GOLDENS[name]["shapes"])
    if converted.model.block.gated_mlp and "blocks.0.mlp.fc1.weight" in arrays:
        arrays = {n: x for n, x in arrays.items() if ".mlp.fc1." not in n}
        written = {n: x for n, x in written.items() if ".mlp.fc1_" not in n}
    assert written.keys() == arrays.keys()
    for key, x in arrays.items():
        np.testing.assert_array_equal(written[key], x, err_msg=key)
