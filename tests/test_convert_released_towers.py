"""DINOv2 and CLIP under the names of their authors: what transformers gives for the same model."""

import json
import re

import helpers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_convert_towers import agree, refused, tower

from kdgqa_jax import convert
from kdgqa_jax.errors import UserError


def arrays_of(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def renamed(arrays, *pairs):
    for pattern, new in pairs:
        arrays = {re.sub(pattern, new, name): x for name, x in arrays.items()}
    return arrays


def fused(arrays, pattern, new):
    """Arrays of q, k and v (or of gate and rest) one after the other, under one name."""
    parts = {}
    for name in list(arrays):
        match = re.fullmatch(pattern, name)
        if match:
            parts.setdefault(match.expand(new), {})[match["part"]] = arrays.pop(name)
    for name, found in parts.items():
        order = [x for x in ("q", "k", "v", "gate", "up") if x in found]
        arrays[name] = np.concatenate([found[x] for x in order])
    return arrays


def dinov2_names(model, chunks=False):
    """The state dict of DINOv2 as its authors released it."""
    arrays = renamed(
        arrays_of(model),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"attention\.o_proj", "attn.proj"),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"mlp\.down_proj", "mlp.w3"),
        (r"^layernorm", "norm"),
    )
    qkv = r"(?P<block>blocks\.\d+)\.attention\.(?P<part>[qkv])_proj\.(?P<leaf>\w+)"
    fused(arrays, qkv, r"\g<block>.attn.qkv.\g<leaf>")
    gate = r"(?P<block>blocks\.\d+)\.mlp\.(?P<part>gate|up)_proj\.(?P<leaf>\w+)"
    fused(arrays, gate, r"\g<block>.mlp.w12.\g<leaf>")
    return renamed(arrays, (r"^blocks\.(\d+)", r"blocks.0.\1")) if chunks else arrays


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "dinov2_registers"])
def test_dinov2_under_the_names_of_its_authors(tmp_path, name, chunks):
    model, part = tower(name)
    arrays = dinov2_names(model, chunks)
    assert ("mask_token" in arrays and "blocks.0.attn.qkv.weight" in arrays) or chunks
    state = {key: torch.from_numpy(x) for key, x in arrays.items()}
    torch.save(state, tmp_path / "a.pth")
    converted = convert.load(tmp_path / "a.pth", num_heads=6)
    assert any("DINOv2's own" in note for note in converted.report.notes)
    agree(name, model, part, converted, 32)
    torch.save({"teacher": state}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="not a state dict"):
        convert.load(tmp_path / "b.pth", num_heads=6)


@pytest.mark.parametrize("side", [16, 48, 56])
def test_dinov2_is_resized_as_its_authors_do_it(tmp_path, side):
    """Scale factors of (new + 0.1) / old, without antialiasing; what torch makes of them."""
    model, _ = tower("dinov2")
    arrays = dinov2_names(model)
    save_file(arrays, tmp_path / "a.safetensors")
    found = convert.load(tmp_path / "a.safetensors", num_heads=6, image_size=side)
    position = torch.from_numpy(arrays["pos_embed"][:, 1:]).reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    scale = (side // 8 + 0.1) / 4
    resized = torch.nn.functional.interpolate(position, scale_factor=(scale, scale), mode="bicubic")
    expected = resized.permute(0, 2, 3, 1).reshape(1, -1, 48).numpy()
    helpers.assert_close(found.variables["params"]["pos_embed"][:, 1:], expected, 1e-5)
    assert "offset 0.1" in str(found.report)


# --- OpenCLIP -----------------------------------------------------------------------------------


def open_clip_names(model, prefix="visual."):
    """The state dict of a CLIP of transformers as OpenCLIP has it, both towers' names in it."""
    arrays = renamed(
        arrays_of(model),
        (r"^vision_model\.", ""),
        (r"^embeddings\.class_embedding", "class_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^embeddings\.patch_embedding", "conv1"),
        (r"^pre_layrnorm", "ln_pre"),
        (r"^post_layernorm", "ln_post"),
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"self_attn\.out_proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    qkv = r"(?P<block>.*)\.self_attn\.(?P<part>[qkv])_proj\.(?P<leaf>\w+)"
    fused(arrays, qkv, r"\g<block>.attn.in_proj_\g<leaf>")
    arrays["proj"] = np.ascontiguousarray(arrays.pop("visual_projection.weight").T)
    arrays = {prefix + name: x for name, x in arrays.items()}
    if prefix:
        other = {name.removeprefix(prefix): x for name, x in arrays.items() if "resblocks" in name}
        arrays |= {name: x + 1 for name, x in other.items()}  # the text tower has such names, too
        arrays |= {"logit_scale": np.ones((), np.float32), "positional_embedding": np.ones((7, 16))}
    return arrays


CONFIG = {"model_cfg": {"embed_dim": 20, "quick_gelu": True,
                        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 8,
                                       "patch_size": 8}},
          "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}  # fmt: skip


def logits_agree(model, part, converted):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.visual_projection(part(images).pooler_output).numpy()
    nhwc = images.numpy().transpose(0, 2, 3, 1)
    helpers.assert_close(helpers.apply(converted.model, converted.variables, nhwc), expected, 1e-4)


def test_open_clip_directories_and_files(tmp_path, capsys):
    model, part = tower("clip_projection")
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(open_clip_names(model), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    converted = convert.load(folder)
    assert converted.model.block.activation == "quick_gelu"
    assert converted.description["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    logits_agree(model, part, converted)
    for prefix in ("visual.", ""):
        file = tmp_path / "a.safetensors"
        save_file(open_clip_names(model, prefix), file)
        said = refused(capsys, tmp_path, file, "--num-heads", "6")
        assert "OpenCLIP leave activation open" in said
        arch = "vit_base_patch16_clip_quickgelu_224"
        logits_agree(model, part, convert.load(file, num_heads=6, arch=arch))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("timm_model_name", "vit_base", "timm_model_name='vit_base' is another visual tower"),
        ("attentional_pool", True, "attentional_pool=True is another visual tower"),
        ("pool_type", "avg", "pool_type='avg'; not 'tok'"),
        ("layers", 12, "layers=12 there, 2 in the weights"),
        ("head_width", 16, "3 query heads, not 6"),
    ],
)
def test_other_towers_of_open_clip_are_refused_by_name(tmp_path, place, value, says):
    model, _ = tower("clip_projection")
    save_file(open_clip_names(model), tmp_path / "open_clip_model.safetensors")
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["vision_cfg"][place] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(says)):
        convert.load(tmp_path, num_heads=6)
