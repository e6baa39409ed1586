"""timm's config.json is honoured, or refused by the name of what it asks for."""

import copy
import itertools
import json
import pathlib

import helpers
import numpy as np
import pytest
from safetensors.numpy import save_file

from kdgqa_jax import convert, vit
from kdgqa_jax.convert import files, preprocessing
from kdgqa_jax.convert.sources import timm
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
        ("avg", "global_pool='avg', but the final norm in the weights is 'norm'; with that pool"),
        ("max", "global_pool='max', but the final norm in the weights is 'norm'"),
        ("map", "global_pool='map' there, 'another' in the weights"),
        ("prr", "global_pool='prr'; the model here pools by one of 'token', 'avg'"),
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
    said = refusal(directory(model_args={"fc_norm": True}))
    assert "global_pool='token' and fc_norm=True, but the final norm in the weights" in said


def test_the_mean_of_normalised_tokens_is_taken_where_it_is_stated(golden, directory):
    loaded = convert.load(directory(global_pool="avg", model_args={"fc_norm": False}))
    values = golden("timm_vit")
    images = values["images_nchw"].transpose(0, 2, 3, 1)
    head = loaded.variables["params"]["head"]
    expected = values["features_mha"][:, 1:].mean(1) @ head["kernel"] + head["bias"]
    found = helpers.apply(loaded.model, loaded.variables, images)
    helpers.assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("pos_embed", "none", "pos_embed='none' changes what the model computes"),
        ("attn_layer", "diff", "attn_layer='diff' changes what the model computes"),
        (
            "block_fn",
            "ParallelThingsBlock",
            "block_fn='ParallelThingsBlock' changes what the model",
        ),
        ("act_layer", "mish", "act_layer='mish' changes what the model computes"),
        ("something_new", 3, "something_new=3 changes what the model computes and is not known"),
        ("qk_norm", True, "qk_norm=True there, False in the weights"),
        ("scale_attn_norm", True, "scale_attn_norm=True there, False in the weights"),
        ("scale_mlp_norm", True, "scale_mlp_norm=True there, False in the weights"),
        ("pre_norm", True, "pre_norm=True there, False in the weights"),
        ("init_values", 1e-5, "init_values=1e-05 there, 0.0 in the weights"),
        ("reg_tokens", 4, "reg_tokens=4 there, 0 in the weights"),
        ("reg_tokens", False, "reg_tokens=False must be a whole number"),
        ("qk_norm", 1, "qk_norm=1 must be true or false"),
        ("norm_layer", "rmsnorm", "left over (--allow-left-over NAME ignores it): blocks.0.norm1"),
        ("proj_bias", False, "left over (--allow-left-over NAME ignores it): blocks.0.attn.proj"),
        ("final_norm", False, "left over (--allow-left-over NAME ignores it): norm.bias"),
        ("no_embed_class", True, "for 17 patches of 8 px does not fit the image size 32"),
        ("block_fn", "ParallelScalingBlock", "left over (--allow-left-over NAME ignores it)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(directory, name, value, says):
    assert says in refusal(directory(model_args={name: value}))


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("act_layer", "quick_gelu", {"activation": "quick_gelu"}),
        ("act_layer", "gelu_tanh", {"activation": "gelu_tanh"}),
        ("block_fn", "ResPostBlock", {"block": "post_norm"}),
        ("pool_include_prefix", True, {"pool_include_prefix": True}),
    ],
)
def test_arguments_that_weights_do_not_show_are_honoured(directory, name, value, option):
    plain = vit.arguments(convert.load(directory()).model)
    found = vit.arguments(convert.load(directory(model_args={name: value})).model)
    assert found == plain | option


def test_arguments_that_do_not_change_it_are_accepted(directory):
    args = {"drop_path_rate": 0.1, "drop_rate": 0.1, "dynamic_img_size": True, "init_values": None,
            "act_layer": "gelu", "norm_layer": "layernorm", "pre_norm": False, "fc_norm": None,
            "reg_tokens": 0, "class_token": True, "qkv_bias": True}  # fmt: skip
    ratio = convert.load(directory()).model.block.mlp_width / 48
    convert.load(directory(model_args={**args, "mlp_ratio": ratio}))


# The golden weights are those of a plain ViT: what each of these has is missing in them.
DIFFERENT = {
    "vit_base_patch16_rpn_224": "qkv_bias=False there, True in the weights",
    "vit_base_patch16_xp_224": "pre_norm=True there",
    "vit_small_patch16_18x2_224": "several attentions and MLPs beside each other",
    "vit_pwee_patch16_reg1_gap_256": "reg_tokens=1 there",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_base_patch16_clip_quickgelu_224": "pre_norm=True there",
    "vit_base_patch32_clip_224": "pre_norm=True there",
    "vit_base_patch16_gap_224": "left over (--allow-left-over NAME ignores it): cls_token",
    "vit_base_patch16_siglip_224": "global_pool='map' there",
    "vit_so150m_patch16_reg4_map_256": "reg_tokens=4 there",
    "beit3_base_patch16_224": "scale_attn_norm=True there",
    "aimv2_large_patch14_224": "mlp_layer=True there",
    "vit_small_patch14_reg4_dinov2": "reg_tokens=4 there",
    "vit_base_patch16_radio_v3": "reg_tokens=7 there",
    "flexivit_base": "does not fit the image size",
    "deit3_small_patch16_224": "init_values=1e-05 there",
    "vit_small_patch14_dinov2": "init_values=1e-05 there",
    "vit_base_patch16_224_miil_in21k": "qkv_bias=False there",
    "deit_base_distilled_patch16_384": "architecture='token' there, 'none' in the weights",
    "resnet50": "is not known",
    "": "is not known",
}  # fmt: skip


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_architectures_that_the_weights_are_not_of_are_refused(directory, architecture):
    pool = {"global_pool": None, "model_args": {"num_heads": None, "embed_dim": None}}
    said = refusal(directory(architecture=architecture, **pool), num_heads=6)
    assert DIFFERENT[architecture] in said


@pytest.mark.parametrize(
    "architecture",
    ["vit_base_patch8_224_dino", "vit_large_patch32_384", "vit_giant_patch14_224",
     "vit_base_patch16_224_in21k", "deit_tiny_patch16_224", "eva_large_patch14_336"],
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
            stated = timm.stated(source.config, "a/config.json")
            preprocessing.describe(source, (32, 32))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            refused += 1
        else:
            assert stated.get("num_heads") in (6, None) and stated.get("image_size") == (32, 32)
    assert refused > 100
