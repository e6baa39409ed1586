"""What timm's config.json says of a model: honoured, or refused by the name of the feature.

timm builds a model from its `architecture`, changed by `model_args` and, for what those leave open,
by `pretrained_cfg`. Many of its architectures have the parameter names of a plain ViT and compute
something else; none of them is taken for one.
"""

import re
from collections.abc import Mapping
from typing import Any

from kdgqa_jax.errors import LARGEST, UserError, one_line

Values = dict[str, tuple[str, Any]]

_SIZES = {  # width and query heads
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
}

_PLAIN = re.compile(
    rf"(vit|deit|eva)_({'|'.join(_SIZES)})(_distilled)?_patch\d+_\d+(_(in21k|dino|sam|miil))*"
)
"""Architectures that compute as the ViT here, whatever their sizes."""

_TEST_VIT = {"test_vit": (64, 2)}

_FEATURES = {
    r"_rpn_": "norms after the attention and the MLP instead of before (res-post-norm)",
    r"_xp_|_d?pwee_|_18x2_": "attention and MLP beside each other (parallel blocks)",
    r"_dlittle_|_dwee_": "differential attention",
    r"quickgelu": "quick GELU",
    r"clip": "a norm before the blocks (norm_pre)",
    r"siglip.*gap|_gap_": "the mean over tokens that are normalised before it, or register tokens",
    r"siglip|_map_": "attention pooling",
    r"^beit3": "norms within the attention and the MLP",
    r"^aimv2|^test_vit4": "RMSNorm",
    r"_reg\d|radio|^test_vit": "register tokens",
    r"^flexivit": "a position embedding without the class token (no_embed_class)",
    r"^deit3|dinov2|_plus_|_36x1_|intern": "layer scale",
}
"""What others of timm's vision_transformer.py and deit.py have; the first pattern that matches."""

_NO_MATTER = (  # of training, of initial weights, or of images of another size
    r"drop_rate|(pos|patch|proj|attn)_drop_rate|drop_path_rate|weight_init|fix_init"
    r"|dynamic_img_size|dynamic_img_pad|strict_img_size|pretrained.*|out_indices"
)

_AS_HERE: Mapping[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "proj_bias": (True,),
    "pos_embed": ("learn",),
    "no_embed_class": (False,),
    "reg_tokens": (0,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "pool_include_prefix": (False,),
    "norm_layer": ("layernorm",),
    "act_layer": ("gelu",),
    "attn_layer": ("", "attn"),
    "use_naflex": (False,),
}
"""Arguments of timm's VisionTransformer that change the computation: the values it has here."""

_VALUES = {
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "img_size": "image_size",
    "in_chans": "channels",
    "num_classes": "num_classes",
    "qkv_bias": "qkv_bias",
    "class_token": "class_token",
}
"""Arguments of timm's VisionTransformer and what they are here."""


def is_timm(config: dict[str, Any]) -> bool:
    """If a config.json is one that timm wrote."""
    return not config.keys().isdisjoint({"architecture", "pretrained_cfg", "model_args"})


def values(config: dict[str, Any], place: str) -> tuple[Values, int | None]:
    """What a config.json of timm states, and the width to which its number of heads belongs.

    Args:
      config: the JSON object.
      place: what errors call it.

    Returns:
      By our name (their name, value); the width of the architecture where the number of heads is
      that of the architecture, which holds for no other width. None: it holds for any.

    Raises:
      UserError: an architecture, an argument or a pooling that computes something else.
    """
    arguments = _section(config, "model_args", place)
    pretrained = pretrained_cfg(config, place)
    width, num_heads = _of_architecture(config.get("architecture"), place)
    stated = {"num_heads": ("architecture", num_heads)} if num_heads else {}
    size = pretrained.get("input_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 3:
            raise UserError(f"{place}: input_size={_shown(size)} must be [channels, height, width]")
        stated["channels"] = ("input_size", size[0])
        stated["image_size"] = ("input_size", size[1:])
    for place_of_it in (pretrained, config):
        if place_of_it.get("num_classes") is not None:
            stated["num_classes"] = ("num_classes", place_of_it["num_classes"])
    for name, value in arguments.items():
        if name in _VALUES and value is not None:
            stated[_VALUES[name]] = (name, value)
        elif name not in ("global_pool", "fc_norm", "mlp_ratio"):
            _check_argument(name, value, place)
    ratio = arguments.get("mlp_ratio")
    if ratio is not None:
        stated["mlp_width"] = (
            "mlp_ratio",
            _mlp_width(ratio, arguments.get("embed_dim", width), place),
        )
    stated |= _pooling(config, arguments, pretrained, place)
    own = arguments.get("embed_dim") is None and arguments.get("num_heads") is None
    return stated, width if own else None


def pretrained_cfg(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The section `pretrained_cfg`, which in old files is the whole of it."""
    return _section(config, "pretrained_cfg", place) if "pretrained_cfg" in config else config


def _section(config: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    section = config.get(name)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{place}: {name}={_shown(section)} must be a JSON object")
    return section or {}


def _of_architecture(name: Any, place: str) -> tuple[int | None, int | None]:
    """(width, query heads) of an architecture, which hold unless `model_args` has others."""
    if name is None:
        return None, None
    bare = name.split(".")[0] if isinstance(name, str) else ""
    match = _PLAIN.fullmatch(bare)
    if match:
        return _SIZES[match[2]]
    if bare in _TEST_VIT:
        return _TEST_VIT[bare]
    has = next((what for pattern, what in _FEATURES.items() if re.search(pattern, bare)), None)
    why = f"has {has}" if has else "is not known to compute as the ViT here"
    raise UserError(
        f"{place}: architecture {_shown(name)} {why}; of timm's, plain vit_* and deit_* are read"
    )


def _mlp_width(ratio: Any, width: Any, place: str) -> int:
    """The width that timm gives the MLP."""
    if all(type(x) in (int, float) and 0 < x < LARGEST for x in (ratio, width)):
        return int(width * ratio)
    raise UserError(f"{place}: mlp_ratio={_shown(ratio)} must be a number, of a known embed_dim")


def _check_argument(name: str, value: Any, place: str) -> None:
    if value is None or re.fullmatch(_NO_MATTER, name):
        return
    known = _AS_HERE.get(name, ())
    if not any(value is k or (value == k and type(value) is type(k)) for k in known):
        here = f"; here it is {' or '.join(map(repr, known))}" if known else ""
        raise UserError(
            f"{place}: model_args {one_line(name, 60)}={_shown(value)} changes what the model"
            f" computes and is not known{here}"
        )


def _pooling(
    config: dict[str, Any], arguments: dict[str, Any], pretrained: dict[str, Any], place: str
) -> Values:
    places = (arguments, config, pretrained)
    pools = [p["global_pool"] for p in places if p.get("global_pool") is not None]
    if any(pool != pools[0] for pool in pools):
        raise UserError(f"{place}: global_pool is {' and '.join(map(_shown, pools))} in one file")
    pool, fc_norm = (pools or [None])[0], arguments.get("fc_norm")
    if pool not in (None, "token", "avg"):
        raise UserError(
            f"{place}: global_pool={_shown(pool)}; the model here pools by the class token"
            " ('token') or the mean ('avg')"
        )
    if fc_norm is not None and fc_norm != (pool == "avg"):
        how = "normalises tokens before their mean" if pool == "avg" else "normalises after pooling"
        raise UserError(f"{place}: fc_norm={_shown(fc_norm)} {how}, which the model here does not")
    return {} if pool is None else {"pool": ("global_pool", pool)}


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
