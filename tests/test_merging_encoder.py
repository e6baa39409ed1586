"""Encoders of transformers with fewer key/value heads: against it, and what is refused."""

import json
import shutil

import encoder_helpers
import helpers
import jax
import numpy as np
import pytest
import torch
from encoder_helpers import HEADS, MODELS
from safetensors.numpy import load_file, save_file

from kdgqa_jax import cli, convert
from kdgqa_jax.convert import encoder_inputs, encoders, merging_encoder
from kdgqa_jax.convert.encoder_forward import hidden_states, layers_of
from kdgqa_jax.errors import UserError

KINDS = list(MODELS)
WORDS = [f"word{i}" for i in range(34)]


def tokenizer_json():
    """Words, each of them a token, between two others."""
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "?", "[A]", *WORDS, "[B]"])}
    post = [{"SpecialToken": {"id": "[A]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "[B]", "type_id": 0}}]  # fmt: skip
    special = {n: {"id": n, "ids": [vocabulary[n]], "tokens": [n]} for n in ("[A]", "[B]")}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": post, "pair": post,
                           "special_tokens": special},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"},
    }  # fmt: skip


class Source:
    """A directory that transformers has written, with files that belong to a model."""

    def __init__(self, kind, path):
        self.kind, self.path = kind, path
        self.model = encoder_helpers.randomised(MODELS[kind]())
        self.model.save_pretrained(path)
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text("{}")
        (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        (path / "pytorch_model.bin").write_bytes(b"old")
        self.inputs, self.real = encoder_helpers.inputs_of(kind)
        self.encoder = encoders.read(str(path))

    def run(self, path=None):
        """transformers' hidden states and what attention saw, of another directory or this."""
        model = self.model if path is None else type(self.model).from_pretrained(path).eval()
        return encoder_helpers.run(model, self.kind, self.inputs, self.real)

    def computed(self, attention=None):
        """Ours."""
        mask = None if self.kind == "whisper" else self.real
        layers = layers_of(self.encoder, attention)
        return hidden_states(self.encoder, layers, self.inputs, mask)

    def assert_same(self, ours, theirs, relative=1e-5):
        helpers.assert_close(ours[self.real], theirs[self.real], relative)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("encoder") / "source"
            made[kind] = Source(kind, path)
        return made[kind]

    return make


@pytest.fixture(params=KINDS)
def source(request, make):
    return make(request.param)


# --- what is computed and written ---------------------------------------------------------------


def test_every_architecture_is_tested(make):
    kinds = {make(kind).encoder.kind for kind in KINDS}
    assert kinds | {"xlm-roberta"} == encoders.ARCHITECTURES.keys()


def test_encoders_compute_what_transformers_does(source):
    expected, _ = source.run()
    source.assert_same(source.computed(), expected)
    assert np.ptp(expected) > 0.1


def test_as_many_heads_change_nothing(source, tmp_path):
    merged = convert.merge_encoder(source.path, HEADS, "svd", source.inputs)
    merged.save(tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (source.path, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    hidden, _ = source.run(tmp_path / "out")
    source.assert_same(hidden, source.run()[0])
    assert merged.rows()[0][1:] == ("100.00", "100.00")


@pytest.mark.parametrize("pooling", ["svd", "mean"])
def test_transformers_computes_what_merged_heads_do(source, tmp_path, pooling):
    calibration = source.inputs if pooling == "svd" else None
    merged = convert.merge_encoder(source.path, 2, pooling, calibration)
    assert merged.attention[1]["key"]["kernel"].shape == (48, 2, 8)
    assert ("bias" in merged.attention[0]["key"]) == (source.kind != "whisper")
    merged.save(tmp_path / "out")
    hidden, _ = source.run(tmp_path / "out")
    source.assert_same(source.computed(merged.attention), hidden)
    other = np.abs(hidden - source.run()[0])[source.real].max()
    assert other > 1e-2 * helpers.largest(hidden)
    for path in source.path.rglob("*"):
        name = path.relative_to(source.path)
        copied = tmp_path / "out" / name
        if str(name) == "pytorch_model.bin":
            assert not copied.exists()
        elif path.is_file() and str(name) != "model.safetensors":
            assert copied.read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "1_Pooling").stat().st_mode & 0o111


def test_energy_that_is_reported_equals_that_of_all_tokens(source):
    merged = convert.merge_encoder(source.path, 2, "svd", source.inputs)
    _, seen = source.run()
    assert len(seen) == len(merged.merged) == 2
    for i, layer in enumerate(merged.merged):
        before = source.encoder.attention(i)
        keys, values = encoder_helpers.naive_energies(
            seen[i], source.real, before, layer.attention, 2
        )
        helpers.assert_close(layer.key_energy, keys[0], 1e-4)
        helpers.assert_close(layer.key_lost, keys[1], 1e-4)
        helpers.assert_close(layer.value_energy, values[0], 1e-4)
        helpers.assert_close(layer.value_lost, values[1], 1e-4)
        kept = [100 * (1 - x[1] / x[0]).min() for x in (keys, values)]
        assert merged.rows()[i] == (str(i), *(f"{x:.2f}" for x in kept))


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("bert with a head", ["embeddings.LayerNorm", "encoder.layer.0.output.LayerNorm"]),
        ("clip", ["encoder.layers.0.layer_norm1", "encoder.layers.1.layer_norm1"]),
        ("whisper", ["layers.0.self_attn_layer_norm", "layers.1.self_attn_layer_norm"]),
    ],
)
def test_without_data_by_the_norms_that_attention_sees(make, kind, norms):
    source = make(kind)
    merged = convert.merge_encoder(source.path, 3)
    for i, name in enumerate(norms):
        norm = encoder_helpers.encoder_of(source.model).get_submodule(name)
        moments = convert.data_free_moments(*(x.detach().numpy() for x in norm.parameters()))
        expected = convert.merge_heads(source.encoder.attention(i), 3, moments)
        helpers.assert_close(merged.attention[i], expected.attention, 1e-9)
    assert "without data" in merged.report


def test_dtypes_are_kept(make, tmp_path):
    source = make("bert")
    model = type(source.model).from_pretrained(source.path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    convert.merge_encoder(tmp_path / "half", 3, "mean").save(tmp_path / "out")
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype.name for x in arrays.values()} == {"bfloat16"}
    weight = arrays["encoder.layer.0.attention.self.key.weight"].astype(np.float32)
    heads = source.encoder.attention(0)["key"]["kernel"].transpose(1, 2, 0).reshape(3, 2, 8, 48)
    expected = np.repeat(heads.mean(1), 2, axis=0).reshape(48, 48)
    helpers.assert_close(weight, expected, 1e-2)


# --- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_texts_calibrate_as_their_token_ids_do(make, tmp_path, kind):
    """Also those that are longer than the encoder takes: they are cut."""
    source, rng = make(kind), np.random.default_rng(2)
    longest = 20 if kind == "bert" else 18
    ids = [[2, *rng.integers(3, 37, n), 37] for n in rng.integers(1, 25, 30)]
    texts = [" ".join(WORDS[i - 3] for i in row[1:-1]) for row in ids]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    padding = source.encoder.config["padding"]
    rows = [row if len(row) <= longest else [*row[: longest - 1], 37] for row in ids]
    padded = np.array([row + [padding] * (longest - len(row)) for row in rows])
    np.save(tmp_path / "ids.npy", padded)
    one, two = (
        convert.merge_encoder(source.path, 2, "svd", tmp_path / name)
        for name in ("texts.txt", "ids.npy")
    )
    assert "calibrated with 30 inputs" in one.report
    assert one.notes == two.notes
    for a, b in zip(one.merged, two.merged, strict=True):
        helpers.assert_close(a.key_energy, b.key_energy, 1e-5)
        helpers.assert_close(a.value_lost, b.value_lost, 1e-5)


def test_the_choice_of_inputs_depends_on_the_seed_alone(make, tmp_path):
    encoder = make("clip text").encoder
    np.save(tmp_path / "ids.npy", np.arange(20)[:, None] + 2)
    (found, mask), *_ = encoder_inputs.read(str(tmp_path / "ids.npy"), encoder, 5, 3)
    expected = np.sort(np.random.default_rng(3).permutation(20)[:5])[:, None] + 2
    np.testing.assert_array_equal(found, expected)
    assert mask.all()


def test_which_tokens_of_clip_are_real(make):
    encoder = make("clip text").encoder
    ids = np.array([[38, 5, 39, 39, 39], [38, 4, 3, 2, 39], [38, 4, 3, 2, 5]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(encoder_inputs.real_tokens(ids, encoder), expected)
    first = encoders.Encoder(encoder.folder, "clip", {}, "", {"end": 2})
    np.testing.assert_array_equal(encoder_inputs.real_tokens(ids[:2], first), expected[:2])


# --- the command line, and what is refused ------------------------------------------------------


def test_command_line(make, tmp_path, capsys):
    source = make("bert")
    (tmp_path / "texts.txt").write_text("\n".join(WORDS))
    command = ["merge-encoder", "--source", str(source.path), "--num-kv-heads", "3"]
    command += ["--out", str(tmp_path / "out")]
    options = ["--calibration", str(tmp_path / "texts.txt"), "--calibration-inputs", "10"]
    assert cli.main([*command, *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "bert: 2 layers, 6 to 3 key/value heads (svd), calibrated with 10 inputs" in shown
    # 2 layers x 2 projections x (48 x 48 + 48)
    assert "key and value projections are 4,704 parameters instead of 9,408" in shown
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert cli.main([*command, *options]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "new"), "--seed", "1"]) == 1
    assert "--seed need --calibration" in capsys.readouterr().err


def edited(source, folder, **fields):
    shutil.copytree(source.path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "berd"}, "unknown architecture of .*'berd': did you mean 'bert'"),
        ({"is_decoder": True}, "is_decoder=True is not supported; expected False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"hidden_act": "gely"}, "unknown activation of .*'gely'"),
        ({"num_attention_heads": 5}, r"queries of shape \(48, 48\) are not those of 5 heads"),
    ],
)
def test_configs_that_are_refused(make, tmp_path, fields, says):
    with pytest.raises(UserError, match=says):
        convert.merge_encoder(edited(make("bert"), tmp_path / "model", **fields), 3)


def drop(name):
    def change(folder):
        arrays = load_file(folder / "model.safetensors")
        del arrays[name]
        save_file(arrays, folder / "model.safetensors")

    return change


def cut(folder):
    arrays = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.output.dense.bias"
    arrays[name] = arrays[name][:-1]
    save_file(arrays, folder / "model.safetensors")


def spoil(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["encoder.layer.1.attention.self.key.weight"][3, 4] = np.nan
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: (p / "model.safetensors").unlink(), "holds no model.safetensors; load it in"),
        (lambda p: (p / "model.safetensors").write_bytes(b"{}"), "unknown kind of file"),
        (lambda p: (p / "config.json").unlink(), "config.json: cannot be read"),
        (lambda p: (p / "config.json").write_text("[1]"), "expected a JSON object"),
        (shutil.rmtree, "is not a directory"),
        (drop("encoder.layer.0.attention.self.query.weight"), "holds no layers of an encoder"),
        (drop("encoder.layer.1.attention.self.value.weight"), "holds no encoder.layer.1.atten"),
        (cut, r"layer.1.attention.output.dense does not fit queries of shape \(48, 48\)"),
        (spoil, "NaN or infinity in encoder.layer.1.attention.self.key"),
    ],
)
def test_directories_that_are_refused(make, tmp_path, change, says):
    folder = edited(make("bert"), tmp_path / "model")
    change(folder)
    with pytest.raises(UserError, match=says):
        convert.merge_encoder(folder, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((4,), "6 key/value heads cannot be pooled into 4"),
        ((3, "svt"), "unknown pooling 'svt': did you mean 'svd'"),
        ((3, "mean", "texts.txt"), "'mean' takes no calibration"),
        ((3, "svd", "none.txt"), "none.txt cannot be read"),
        ((3, "svd", "texts.csv"), r"expected .txt with a text in each line, or .npy with token"),
        ((3, "svd", "empty.txt"), "empty.txt holds no text"),
        ((3, "svd", "text.npy"), "text.npy cannot be read"),
        ((3, "svd", "archive.npy"), "archive.npy cannot be read .*no array of inputs"),
        ((3, "svd", "number.npy"), "number.npy cannot be read .*no array of inputs"),
        ((3, "svd", np.ones((2, 5))), r"float64 \(2, 5\); expected token ids"),
        ((3, "svd", np.ones((2, 21), int)), "21 tokens; the encoder takes at most 20"),
        ((3, "svd", np.full((2, 5), 40)), "token ids from 40 to 40; the encoder knows 0 to 39"),
        ((3, "svd", np.zeros((2, 5), int)), "hold no tokens"),
        ((3, "svd", np.zeros((0, 5), int)), "holds no inputs; expected token ids"),
    ],
)
def test_requests_that_are_refused(make, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    for name in ("texts.txt", "text.npy"):
        (tmp_path / name).write_text("word1 word2")
    (tmp_path / "empty.txt").write_text("\n \n")
    np.save("number.npy", np.ones((), int))
    np.savez("archive.npz", np.ones((2, 5), int))
    (tmp_path / "archive.npz").rename("archive.npy")
    with pytest.raises(UserError, match=says):
        convert.merge_encoder(make("bert").path, *arguments)


def test_sound_is_calibrated_with_features_alone(make, tmp_path):
    source = make("whisper")
    (tmp_path / "texts.txt").write_text("word1 word2")
    for calibration, says in (
        (tmp_path / "texts.txt", "whisper takes no texts"),
        (source.inputs[..., :-1], r"expected features \('n', 5, 18\)"),
        (source.inputs * np.nan, "features hold NaN"),
        (np.ones((2, 5), int), "expected features"),
    ):
        with pytest.raises(UserError, match=says):
            convert.merge_encoder(source.path, 3, "svd", calibration)


def test_a_failed_write_leaves_nothing(make, tmp_path, monkeypatch):
    merged = convert.merge_encoder(make("bert").path, 3)
    with pytest.raises(UserError, match="lies in the source"):
        merged.save(make("bert").path / "out")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging_encoder.shutil, "copytree", fails)
    with pytest.raises(UserError, match="No space left on device"):
        merged.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
