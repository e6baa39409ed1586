"""What the names of timm's architectures stand for: arguments of its VisionTransformer.

`arguments(name)` gives those that differ from timm's defaults. Only names that are known to
compute what they say are in the table: timm's vision_transformer.py and deit.py, as of 1.0.
"""

import re
from typing import Any

from kdgqa_jax.errors import UserError, one_line

WIDTHS: dict[str, tuple[int, int]] = {
    "tiny": (192, 3), "xsmall": (256, 4), "wee": (256, 4), "pwee": (256, 4), "little": (320, 5),
    "small": (384, 6), "medium": (512, 8), "mediumd": (512, 8), "betwixt": (640, 10),
    "base": (768, 12), "so150m2": (832, 13), "so150m": (896, 14), "large": (1024, 16),
    "intern300m": (1024, 16), "so400m": (1152, 16), "huge": (1280, 16), "giant": (1408, 16),
    "giantopt": (1536, 16), "gigantic": (1664, 16),
}  # fmt: skip
"""By the word in a name: model width and query heads."""

_SIZE = rf"_(?P<size>{'|'.join(sorted(WIDTHS, key=len, reverse=True))})"
_PATCH = r"_patch\d+"
_PIXELS = r"_\d+"
_REGISTERS = r"_reg(?P<reg_tokens>\d)"

_PLUS = {"embed_dim": 896, "num_heads": 14}
_GIANT = {"embed_dim": 1536, "num_heads": 24}
_SWIGLU_PACKED = {"mlp_layer": "GluMlp", "act_layer": "silu"}
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
_PATCHES = {"class_token": False, "global_pool": "avg"}
_GAP = {**_PATCHES, "fc_norm": False}
_SIGLIP = {"class_token": False, "global_pool": "map"}
_SIGLIP_2 = r"(?=vit_(base_patch32|giantopt|so400m_patch16|large_patch16_siglip_(gap_)?512))"
_TANH = {"act_layer": "gelu_tanh"}
_APART = {"no_embed_class": True}
_SCALED = {"init_values": 1e-5}
_TEST = {**_SCALED, "class_token": False, "reg_tokens": 1}

_TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
    (rf"vit_(?P<size>intern300m){_PATCH}{_PIXELS}", {**_SCALED, "final_norm": False}),
    (rf"(vit|deit){_SIZE}{_PATCH}{_PIXELS}(_(in21k|dino|sam))*", {}),
    (rf"deit{_SIZE}_distilled{_PATCH}{_PIXELS}", {"distilled": True}),
    (rf"vit{_SIZE}{_PATCH}{_PIXELS}_miil(_in21k)?", {"qkv_bias": False}),
    (rf"eva{_SIZE}{_PATCH}{_PIXELS}", {"global_pool": "avg"}),
    (rf"deit3{_SIZE}{_PATCH}{_PIXELS}", {**_APART, **_SCALED}),
    (rf"flexivit{_SIZE}", _APART),
    (rf"vit_small{_PATCH}_36x1{_PIXELS}", {"embed_dim": 384, "num_heads": 6, **_SCALED}),
    (rf"vit_base{_PATCH}_plus{_PIXELS}", {**_PLUS, **_SCALED}),
    (rf"vit_base{_PATCH}_plus_clip{_PIXELS}", {**_PLUS, **_CLIP}),
    (rf"vit{_SIZE}{_PATCH}_clip{_PIXELS}", _CLIP),
    (rf"vit{_SIZE}{_PATCH}_clip_quickgelu{_PIXELS}", {**_CLIP, "act_layer": "quick_gelu"}),
    (rf"{_SIGLIP_2}vit{_SIZE}{_PATCH}_siglip{_PIXELS}", {**_SIGLIP, **_TANH}),
    (rf"{_SIGLIP_2}vit{_SIZE}{_PATCH}_siglip_gap{_PIXELS}", {**_GAP, **_TANH}),
    (rf"vit{_SIZE}{_PATCH}_siglip{_PIXELS}", _SIGLIP),
    (rf"vit{_SIZE}{_PATCH}_siglip_gap{_PIXELS}", _GAP),
    (rf"vit_base{_PATCH}_gap{_PIXELS}", {"embed_dim": 768, "num_heads": 16, **_GAP}),
    (rf"vit_(?P<size>huge|giant){_PATCH}_gap{_PIXELS}", _GAP),
    (rf"vit_(?P<size>medium|betwixt){_PATCH}_gap{_PIXELS}",
     {**_GAP, **_SCALED, "qkv_bias": False}),
    (rf"vit_base{_PATCH}{_REGISTERS}_gap{_PIXELS}",
     {"embed_dim": 768, "num_heads": 12, **_PATCHES, **_APART}),
    (rf"vit_(?P<size>wee|little|medium|mediumd|betwixt){_PATCH}{_REGISTERS}_gap{_PIXELS}",
     {**_PATCHES, **_APART, **_SCALED}),
    (rf"vit_(?P<size>pwee){_PATCH}{_REGISTERS}_gap{_PIXELS}",
     {**_PATCHES, **_APART, **_SCALED, "block_fn": "ParallelScalingBlock"}),
    (rf"vit_(?P<size>so150m){_PATCH}{_REGISTERS}_gap{_PIXELS}", _GAP),
    (rf"vit_(?P<size>so150m){_PATCH}{_REGISTERS}_map{_PIXELS}", _SIGLIP),
    (rf"vit_(?P<size>so150m2){_PATCH}{_REGISTERS}_gap{_PIXELS}",
     {**_PATCHES, **_SCALED, "qkv_bias": False}),
    (rf"vit_giant{_PATCH}_dinov2", {**_GIANT, **_SCALED, **_SWIGLU_PACKED}),
    (rf"vit_giant{_PATCH}{_REGISTERS}_(dinov2|tipsv2)",
     {**_GIANT, **_SCALED, **_SWIGLU_PACKED, **_APART}),
    (rf"vit{_SIZE}{_PATCH}_dinov2", _SCALED),
    (rf"vit{_SIZE}{_PATCH}{_REGISTERS}_(dinov2|tipsv2)", {**_SCALED, **_APART}),
    (rf"vit_giant{_PATCH}_radio_v3", {**_GIANT, **_APART, "reg_tokens": 7, "final_norm": False}),
    (rf"vit_(?P<size>huge){_PATCH}_radio_v3", {**_APART, "reg_tokens": 7, "final_norm": False}),
    (rf"vit_(?P<size>base|large){_PATCH}_radio_v3",
     {**_APART, **_SCALED, "reg_tokens": 7, "final_norm": False}),
    (rf"vit{_SIZE}{_PATCH}_radio_v4", {**_APART, "reg_tokens": 9, "final_norm": False}),
    (rf"vit_base{_PATCH}_rpn{_PIXELS}",
     {"embed_dim": 768, "num_heads": 12, **_PATCHES, "qkv_bias": False,
      "block_fn": "ResPostBlock"}),
    (rf"vit{_SIZE}{_PATCH}_xp{_PIXELS}",
     {**_APART, "pre_norm": True, "norm_layer": "rmsnorm", "qkv_bias": False, "qk_norm": True,
      "block_fn": "ParallelScalingBlock"}),
    (rf"beit3{_SIZE}{_PATCH}{_PIXELS}",
     {"global_pool": "avg", "norm_eps": 1e-5, "scale_attn_norm": True, "scale_mlp_norm": True}),
    (rf"aimv2_(?P<size>large|huge|1b|3b){_PATCH}{_PIXELS}",
     {**_GAP, "qkv_bias": False, "proj_bias": False, "norm_layer": "rmsnorm", "norm_eps": 1e-5,
      "embed_norm_layer": "rmsnorm", "mlp_layer": "SwiGLU", "act_layer": "silu"}),
    (r"test_vit", {"embed_dim": 64, "num_heads": 2}),
    (r"test_vit2", {**_TEST, "embed_dim": 64, "num_heads": 2, "global_pool": "avg"}),
    (r"test_vit3", {**_TEST, "embed_dim": 96, "num_heads": 3, "global_pool": "map",
                    "pool_include_prefix": True}),
    (r"test_vit4", {**_TEST, "embed_dim": 96, "num_heads": 3, "global_pool": "avg",
                    "norm_layer": "rmsnorm"}),
)  # fmt: skip
"""(pattern of names, arguments); the first row that matches a whole name."""

_AIM = {"large": (1024, 8), "huge": (1536, 12), "1b": (2048, 16), "3b": (3072, 24)}

_FEATURES = {
    r"_18x2_": "several attentions and MLPs beside each other in a block (ParallelThingsBlock)",
    r"_d(pwee|wee|little)_": "differential attention",
}
"""What others have that is not computed here."""


def arguments(name: Any, place: str) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer that a name stands for.

    `norm_eps` is that of all norms; layers are called by the names of timm's classes.

    Args:
      name: with or without a tag: "vit_base_patch16_clip_224.openai".
      place: what errors call the place of the name.

    Raises:
      UserError: an architecture that is not known, or not computed here, by its feature.
    """
    bare = name.split(".")[0] if isinstance(name, str) else ""
    for pattern, found in _TABLE:
        match = re.fullmatch(pattern, bare)
        if match:
            said = match.groupdict()
            widths = _AIM if bare.startswith("aimv2") else WIDTHS
            size = dict(zip(("embed_dim", "num_heads"), widths.get(said.get("size"), ())))  # noqa: B905
            registers = int(said.get("reg_tokens") or 0)
            return {**size, **({"reg_tokens": registers} if registers else {}), **found}
    has = next((what for pattern, what in _FEATURES.items() if re.search(pattern, bare)), None)
    why = f"has {has}, which is not computed here" if has else "is not known"
    raise UserError(
        f"{place}: architecture {one_line(repr(name), 60)} {why}; of timm's, the ViTs of"
        " vision_transformer.py and deit.py are read"
    )
