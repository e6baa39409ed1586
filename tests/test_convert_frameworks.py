"""Checkpoints of Hugging Face transformers and Google AugReg give the numbers of the source."""

import json
import re

import helpers
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from kdgqa_jax import convert

# --- Hugging Face transformers ------------------------------------------------------------------


def hugging_face(model_class, **changes):
    """A small model with random weights large enough for attention to matter."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "image_size": 24,
        "intermediate_size": 96, "patch_size": 8, "num_labels": 5, **changes,
    }  # fmt: skip
    model = model_class(model_class.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def to_transformers_4(name):
    """The name that transformers 4 gave a parameter of transformers 5."""
    for pattern, old in (
        (r"^((?:vit\.|deit\.)?)layers\.", r"\1encoder.layer."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ):
        name = re.sub(pattern, old, name)
    return name


CLASSES = {
    "vit": transformers.ViTForImageClassification,
    "deit": transformers.DeiTForImageClassification,
    "deit_teacher": transformers.DeiTForImageClassificationWithTeacher,
    "features": transformers.ViTModel,
}


@pytest.mark.parametrize("release", [4, 5])
@pytest.mark.parametrize("name", list(CLASSES))
def test_hugging_face_models_agree(tmp_path, name, release):
    model = hugging_face(CLASSES[name])
    weights = {key: x.numpy() for key, x in model.state_dict().items()}
    if release == 4:
        weights = {to_transformers_4(key): x for key, x in weights.items()}
        assert any(".encoder.layer.2.attention.attention.key.weight" in f".{k}" for k in weights)
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    images = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        output = model(images, output_hidden_states=True)
        base = model if name == "features" else getattr(model, model.base_model_prefix)
        features = base.layernorm(output.hidden_states[-1]).numpy()
    expected = output.pooler_output if name == "features" else output.logits
    nhwc = images.numpy().transpose(0, 2, 3, 1)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        loaded = convert.load(place)
        assert loaded.model.attention.num_heads == 6 and loaded.model.block.norm_epsilon == 1e-12
        found = helpers.apply(loaded.model, loaded.variables, nhwc, method="features")
        helpers.assert_close(found, features, 1e-5)
        logits = helpers.apply(loaded.model, loaded.variables, nhwc)
        helpers.assert_close(logits, expected.numpy(), 1e-5)


def loaded_with_equal_logits(directory, model):
    """What `convert.load` makes of the directory of a Hugging Face model."""
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = model(images).logits.numpy()
    converted = convert.load(directory)
    logits = helpers.apply(
        converted.model, converted.variables, images.numpy().transpose(0, 2, 3, 1)
    )
    helpers.assert_close(logits, expected, 1e-5)
    return converted


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_what_save_pretrained_writes_is_read(tmp_path, name):
    model = hugging_face(CLASSES[name], id2label={i: f"kind {i}" for i in range(5)})
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
                "size": {"shortest_edge": 32},
                "do_center_crop": True,
                "resample": 3,
            }
        )
    )
    converted = loaded_with_equal_logits(tmp_path, model)
    assert converted.description["class_names"][3] == "kind 3"
    assert converted.description["preprocessing"] == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "resize": "shorter_side",
        "crop_share": 0.75,
        "rounding": "hugging_face",
    }


def test_pickled_hugging_face_directory(tmp_path):
    model = hugging_face(CLASSES["vit"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded_with_equal_logits(tmp_path, model)


def test_repository_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    """The layout of huggingface_hub's cache, as a download leaves it."""
    model = hugging_face(CLASSES["vit"])
    root = tmp_path / "models--someone--small-vit"
    model.save_pretrained(root / "snapshots" / ("0" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert convert.load("hf:someone/small-vit").model.depth == 3


# --- Google AugReg ------------------------------------------------------------------------------


def to_augreg(weights, num_heads):
    """The official .npz layout, from timm's."""
    arrays = {
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    width = weights["cls_token"].shape[-1]
    for i in range(2):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        qkv = [np.split(weights[f"{ours}.attn.qkv.{x}"], 3) for x in ("weight", "bias")]
        for name, weight, bias in zip(("query", "key", "value"), *qkv, strict=True):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, num_heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(num_heads, -1)
        out = weights[f"{ours}.attn.proj.weight"].T
        arrays[f"{attention}/out/kernel"] = out.reshape(num_heads, -1, width)
        arrays[f"{attention}/out/bias"] = weights[f"{ours}.attn.proj.bias"]
        for k, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}/LayerNorm_{k}/scale"] = weights[f"{ours}.{norm}.weight"]
            arrays[f"{theirs}/LayerNorm_{k}/bias"] = weights[f"{ours}.{norm}.bias"]
        for k in (0, 1):
            dense = f"{theirs}/MlpBlock_3/Dense_{k}"
            arrays[f"{dense}/kernel"] = weights[f"{ours}.mlp.fc{k + 1}.weight"].T
            arrays[f"{dense}/bias"] = weights[f"{ours}.mlp.fc{k + 1}.bias"]
    return arrays


def test_augreg_file_equals_the_timm_file(golden, tmp_path):
    values = golden("timm_vit")
    weights = helpers.golden_weights(values)
    np.savez(tmp_path / "a.npz", **to_augreg(weights, 6))
    converted = convert.load(tmp_path / "a.npz")  # the heads are an axis of the file
    images = values["images_nchw"].transpose(0, 2, 3, 1)
    logits = helpers.apply(converted.model, converted.variables, images)
    helpers.assert_close(logits, values["logits_mha"], 1e-5)
    save_file(weights, tmp_path / "a.safetensors")
    timm = convert.load(tmp_path / "a.safetensors", num_heads=6)
    jax.tree.map(np.testing.assert_array_equal, converted.variables, timm.variables)


def test_augreg_file_with_a_representation_layer(golden, tmp_path):
    values = golden("timm_vit")
    arrays = to_augreg(helpers.golden_weights(values), 6)
    kernel, bias = helpers.normal(1, 48, 20), helpers.normal(2, 20)
    arrays |= {"pre_logits/kernel": kernel, "pre_logits/bias": bias}
    arrays["head/kernel"] = helpers.normal(3, 20, 7)
    np.savez(tmp_path / "a.npz", **arrays)
    converted = convert.load(tmp_path / "a.npz")
    images = values["images_nchw"].transpose(0, 2, 3, 1)
    hidden = np.tanh(values["features_mha"][:, 0] @ kernel + bias)
    expected = hidden @ arrays["head/kernel"] + arrays["head/bias"]
    logits = helpers.apply(converted.model, converted.variables, images)
    helpers.assert_close(logits, expected, 1e-4)
    tuned = convert.load(tmp_path / "a.npz", num_classes=3)  # the layer goes with the old head
    assert tuned.model.representation_size == 0
    assert tuned.variables["params"]["head"]["kernel"].shape == (48, 3)
