"""timm's config.json is honoured, or refused by the name of what it asks for."""

import copy
import itertools
import json
import pathlib

import helpers
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdgqa_jax import convert
from kdgqa_jax.convert import files, preprocessing, stated
from kdgqa_jax.errors import UserError

CONFIG = {
    "architecture": "vit_small_patch16_224",
    "num_classes": 7,
    "num_features": 48,
    "global_pool": "token",
    "model_args": {"embed_dim": 48, "num_heads": 6, "patch_size": 8, "img_size": 32, "depth": 2},
    "pretrained_cfg": {
        "tag": "none", "custom_load": False, "input_size": [3, 32, 32], "fixed_input_size": True,
        "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "num_classes": 7,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "first_conv": "patch_embed.proj",
        "pool_size": None, "classifier": "head",
    },
}  # fmt: skip
"""As timm writes it beside the golden model."""


@pytest.fixture
def directory(golden, tmp_path):
    """Writes the weights of the golden model and a config.json that is changed by `changes`."""

    def write(weights=None, model_args=None, pretrained_cfg=None, **changes):
        weights = helpers.golden_weights(golden("timm_vit")) if weights is None else weights
        save_file(
            {k: np.ascontiguousarray(x) for k, x in weights.items()},
            tmp_path / "model.safetensors",
        )
        config = {**CONFIG, **changes}
        for name, more in (("model_args", model_args), ("pretrained_cfg", pretrained_cfg)):
            config[name] = {**CONFIG[name], **(more or {})}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def refusal(place, **options):
    with pytest.raises(UserError) as error:
        convert.load(place, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_directory_of_timm_gives_timms_logits_without_a_flag(golden, directory):
    values = golden("timm_vit")
    loaded = convert.load(directory())
    images = values["images_nchw"].transpose(0, 2, 3, 1)
    logits = helpers.apply(loaded.model, loaded.variables, images)
    helpers.assert_close(logits, values["logits_mha"], 1e-5)
    assert not any("guessed" in note for note in loaded.report.notes)


@pytest.mark.parametrize(
    ("model_args", "architecture", "heads"),
    [
        ({"num_heads": 12}, "vit_small_patch16_224", 12),
        ({"num_heads": None}, "vit_small_patch16_224", 6),  # that of the architecture, as in timm
        ({"num_heads": None}, "vit_base_patch16_224.augreg_in1k", 12),
        ({"num_heads": None}, "vit_tiny_patch16_224", 3),
        ({"num_heads": None}, "deit_large_patch16_224", 16),
        ({"num_heads": None}, "test_vit", 2),
    ],
)
def test_heads_are_those_of_the_config(directory, model_args, architecture, heads):
    loaded = convert.load(directory(model_args=model_args, architecture=architecture))
    assert loaded.model.attention.num_heads == heads
    said = refusal(directory(model_args=model_args, architecture=architecture), num_heads=24)
    assert f"has {heads} query heads, not 24" in said


def test_heads_of_an_architecture_of_another_width_are_not_taken(directory):
    args = {"num_heads": None, "embed_dim": None}
    assert "give --num-heads" in refusal(directory(model_args=args))
    assert convert.load(directory(model_args=args), num_heads=4).model.attention.num_heads == 4


def test_heads_guessed_from_the_width_are_named(tmp_path):
    model = helpers.tiny_vit("mha", width=192, num_heads=12)
    arrays = convert.to_pytorch(model, helpers.vit_variables(model))
    save_file(arrays, tmp_path / "a.safetensors")
    notes = convert.load(tmp_path / "a.safetensors").report.notes
    assert "3 query heads guessed from the width 192: --num-heads" in notes
    notes = convert.load(tmp_path / "a.safetensors", num_heads=12).report.notes
    assert not any("guessed" in note for note in notes)


@pytest.mark.parametrize(
    ("model_args", "pretrained_cfg"),
    [
        ({"img_size": [64, 16]}, {"input_size": [3, 64, 16]}),
        ({"img_size": None}, {"input_size": [3, 64, 16]}),
        ({"img_size": [64, 16]}, {"input_size": [3, 32, 32]}),  # the arguments decide
    ],
)
def test_images_that_are_not_square(directory, model_args, pretrained_cfg):
    place = directory(model_args=model_args, pretrained_cfg=pretrained_cfg)
    assert convert.load(place).model.image_shape == (64, 16)


def test_the_mean_is_taken_where_it_is_stated_and_the_weights_agree(golden, directory):
    weights = helpers.golden_weights(golden("timm_vit"))
    fc = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: x
          for n, x in weights.items()}  # fmt: skip
    place = directory(fc, global_pool="avg", model_args={"global_pool": "avg", "fc_norm": True})
    loaded = convert.load(place)
    images = golden("timm_vit")["images_nchw"].transpose(0, 2, 3, 1)
    expected = helpers.naive_vit(images, loaded.variables["params"], np.arange(6), 8, pool="avg")
    logits = helpers.apply(loaded.model, loaded.variables, images)
    helpers.assert_close(logits, expected, 1e-5)
    said = refusal(directory(fc, global_pool="token"))
    assert "global_pool='token', but the final norm in the weights is 'fc_norm'" in said


@pytest.mark.parametrize("where", ["top", "model_args", "pretrained_cfg"])
@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ("avg", "global_pool='avg', but the final norm in the weights is 'norm'; the model here"),
        ("max", "global_pool='max'; the model here pools by the class token"),
        ("map", "global_pool='map'"),
        ("", "global_pool=''"),
        (["avg"], "global_pool=['avg']"),
    ],
)
def test_other_pooling_is_refused_wherever_it_is_stated(directory, where, pool, says):
    changes = {"global_pool": None, where: {"global_pool": pool}}
    if where == "top":
        changes = {"global_pool": pool}
    assert says in refusal(directory(**changes))


def test_poolings_that_disagree_are_refused(directory):
    said = refusal(directory(model_args={"global_pool": "avg"}))
    assert "global_pool is 'avg' and 'token' in one file" in said
    said = refusal(directory(global_pool="avg", model_args={"fc_norm": False}))
    assert "fc_norm=False normalises tokens before their mean" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("act_layer", "quick_gelu"), ("act_layer", "gelu_tanh"), ("norm_layer", "rmsnorm"),
        ("qk_norm", True), ("scale_attn_norm", True), ("scale_mlp_norm", True),
        ("proj_bias", False), ("pos_embed", "none"), ("no_embed_class", True), ("reg_tokens", 4),
        ("pre_norm", True), ("final_norm", False), ("pool_include_prefix", True),
        ("attn_layer", "diff"), ("init_values", 1e-5), ("block_fn", "ResPostBlock"),
        ("something_new", 3), ("reg_tokens", False),
    ],
)  # fmt: skip
def test_arguments_that_change_the_computation_are_refused_by_name(directory, name, value):
    said = refusal(directory(model_args={name: value}))
    assert f"model_args {name}={value!r} changes what the model computes" in said


def test_arguments_that_do_not_change_it_are_accepted(directory):
    args = {"drop_path_rate": 0.1, "drop_rate": 0.1, "dynamic_img_size": True, "init_values": None,
            "act_layer": "gelu", "norm_layer": "layernorm", "pre_norm": False, "fc_norm": None,
            "reg_tokens": 0, "class_token": True, "qkv_bias": True}  # fmt: skip
    ratio = convert.load(directory()).model.block.mlp_width / 48
    convert.load(directory(model_args={**args, "mlp_ratio": ratio}))


# What timm 1.0 registers with VisionTransformer or its distilled form, one of a kind.
DIFFERENT = {
    "vit_base_patch16_rpn_224": "res-post-norm",
    "vit_base_patch16_xp_224": "parallel blocks",
    "vit_small_patch16_18x2_224": "parallel blocks",
    "vit_pwee_patch16_reg1_gap_256": "parallel blocks",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_base_patch16_clip_quickgelu_224": "quick GELU",
    "vit_base_patch32_clip_224": "norm_pre",
    "vit_base_patch16_gap_224": "mean over tokens that are normalised before it",
    "vit_base_patch16_siglip_gap_224": "mean over tokens that are normalised before it",
    "vit_base_patch16_siglip_224": "attention pooling",
    "vit_so150m_patch16_reg4_map_256": "attention pooling",
    "beit3_base_patch16_224": "norms within the attention",
    "aimv2_large_patch14_224": "RMSNorm",
    "vit_small_patch14_reg4_dinov2": "register tokens",
    "vit_base_patch16_radio_v3": "register tokens",
    "flexivit_base": "no_embed_class",
    "deit3_small_patch16_224": "layer scale",
    "vit_small_patch14_dinov2": "layer scale",
    "vit_base_patch16_plus_240": "layer scale",
    "vit_intern300m_patch14_448": "layer scale",
    "resnet50": "is not known to compute as the ViT here",
    "": "is not known to compute as the ViT here",
}  # fmt: skip


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_architectures_that_compute_something_else_are_refused(directory, architecture):
    said = refusal(directory(architecture=architecture))
    assert f"architecture {architecture!r}" in said and DIFFERENT[architecture] in said


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_patch8_224_dino", "vit_large_patch32_384", "vit_giant_patch14_224",
     "vit_base_patch16_224_miil_in21k", "deit_tiny_patch16_224", "eva_large_patch14_336",
     "deit_base_distilled_patch16_384"],
)  # fmt: skip
def test_plain_architectures_are_read(directory, architecture):
    assert convert.load(directory(architecture=architecture)).model.depth == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_classes": 9}, "num_classes=9 there, 7 in the weights"),
        ({"model_args": {"depth": 12}}, "depth=12 there, 2 in the weights"),
        ({"model_args": {"embed_dim": 192}}, "embed_dim=192 there, 48 in the weights"),
        ({"model_args": {"patch_size": 16}}, "patch_size=16 there, 8 in the weights"),
        ({"model_args": {"mlp_ratio": 9}}, "mlp_ratio=432 there"),
        ({"model_args": {"qkv_bias": False}}, "qkv_bias=False there, True in the weights"),
        ({"model_args": {"in_chans": 1}}, "in_chans=1 there, 3 in the weights"),
        ({"model_args": {"img_size": 64}}, "does not fit the image size 64"),
        ({"model_args": {"num_heads": True}}, "num_heads=True must be a whole number"),
        ({"model_args": {"mlp_ratio": "4"}}, "mlp_ratio='4' must be a number"),
        ({"pretrained_cfg": {"input_size": 224}}, "must be [channels, height, width]"),
    ],
)
def test_a_config_of_another_model_is_refused(directory, changes, says):
    assert says in refusal(directory(**changes))


def test_values_of_any_type_are_refused_in_a_sentence_or_read():
    """In every field of config.json: no other exception, and no other numbers."""
    values = [None, True, -1, 2.5, 10**400, float("nan"), "x", [], [1], [None] * 3, {}, {"a": 1}]
    places = [(None, field) for field in CONFIG]
    places += [(name, field) for name in ("model_args", "pretrained_cfg") for field in CONFIG[name]]
    refused = 0
    for (section, field), value in itertools.product(places, values):
        config = copy.deepcopy(CONFIG)
        (config[section] if section else config)[field] = value
        source = files.Source(pathlib.Path("a/model.safetensors"), {}, config, {}, {})
        try:
            told = stated.stated(source)
            preprocessing.describe(source, (32, 32))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
        else:
            assert told.get("num_heads") in (6, None) and told.get("image_size") == (32, 32)
    assert refused > 100
