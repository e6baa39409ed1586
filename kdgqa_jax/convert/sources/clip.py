"""Vision towers of Hugging Face CLIP and SigLIP, alone or out of the model of two towers."""

import functools
import re
from typing import Any

from kdgqa_jax.convert.sources import hugging_face_config
from kdgqa_jax.convert.sources.layout import Bench, Layout, bias_free_head, numbered
from kdgqa_jax.convert.sources.stated import Stated
from kdgqa_jax.errors import UserError

_BLOCKS = numbered("encoder.layers.{i}", {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj", "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2",
})  # fmt: skip
_EMBEDDINGS = {
    "pos_embed": "embeddings.position_embedding",
    "patch_embed": "embeddings.patch_embedding",
    **_BLOCKS,
}
_CLIP = {
    **_EMBEDDINGS,
    "cls_token": "embeddings.class_embedding",
    "norm_pre": "pre_layrnorm",  # their spelling
    "fc_norm": "post_layernorm",  # of the class token alone
    "head": "projection",
}
_SIGLIP = {
    **_EMBEDDINGS,
    "norm": "post_layernorm",
    "attn_pool/latent": "head.probe",
    "attn_pool/query": "head.attention.in_proj#0/3",
    "attn_pool/key": "head.attention.in_proj#1/3",
    "attn_pool/value": "head.attention.in_proj#2/3",
    "attn_pool/out": "head.attention.out_proj",
    "attn_pool/norm": "head.layernorm",
    "attn_pool/mlp/fc1": "head.mlp.fc1",
    "attn_pool/mlp/fc2": "head.mlp.fc2",
}
_RENAMES = (
    (r"^vision_model\.vision_model\.", "vision_model."),
    (r"^vision_model\.", ""),
    (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
    (r"^embeddings\.position_embedding\.weight$", "embeddings.position_embedding"),
)
_IGNORED = (
    r"text_model\..*", r"text_projection\..*", r"logit_(scale|bias)", r"embeddings\.position_ids",
)  # fmt: skip
_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
_SIGLIP_DEFAULTS = {
    "num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def _surgery(bench: Bench) -> None:
    for name, rank in (("embeddings.position_embedding", 2), ("embeddings.class_embedding", 1)):
        array = bench.get(name, rank)
        if array is not None:
            bench.put(name, array.reshape((1,) * (3 - rank) + array.shape), name, "")
    bias_free_head(bench, "visual_projection.weight", "projection")


def _stated(
    config: dict[str, Any], place: str, kind: str = "clip", defaults: dict[str, Any] = _DEFAULTS
) -> Stated:
    if config.get("vision_use_head") is False or (
        isinstance(config.get("vision_config"), dict)
        and config["vision_config"].get("vision_use_head") is False
    ):
        raise UserError(f"{place}: vision_use_head=False; the model here pools by that head")
    models = (kind, f"{kind}_vision_model")
    if kind == "siglip" and re.fullmatch(r"Siglip2.*", str(config.get("model_type"))):
        raise UserError(f"{place}: SigLIP 2 with patches of any aspect ratio is not computed here")
    return hugging_face_config.stated(config, place, models, defaults)


LAYOUTS = {
    "clip": Layout(
        "Hugging Face CLIP", _CLIP, renames=_RENAMES, ignored=_IGNORED, surgery=_surgery,
        stated=_stated, resize="torch_bicubic", needs=("activation",),
        fixed={"pre_norm": True, "patch_bias": False, "norm_pooled": True, "pool": "token"},
        defaults={"norm_epsilon": 1e-5},
    ),
    "siglip": Layout(
        "Hugging Face SigLIP", _SIGLIP, renames=_RENAMES, ignored=_IGNORED, surgery=_surgery,
        stated=functools.partial(_stated, kind="siglip", defaults=_SIGLIP_DEFAULTS),
        resize="torch_bicubic", fixed={"class_token": False, "pool": "map"},
        defaults={"norm_epsilon": 1e-6, "activation": "gelu_tanh"},
    ),
}  # fmt: skip
