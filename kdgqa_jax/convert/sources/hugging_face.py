"""Hugging Face ViT, DeiT, ViT-MSN and the encoder of ViT-MAE, by transformers 4 and 5."""

from kdgqa_jax.convert.sources import hugging_face_config
from kdgqa_jax.convert.sources.layout import Layout, numbered

BLOCK_5 = {
    "attn/query": "attention.q_proj",
    "attn/key": "attention.k_proj",
    "attn/value": "attention.v_proj",
    "attn/out": "attention.o_proj",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
"""What transformers 5 calls the parts of a block."""

ATTENTION_4 = {
    "attn/query": "attention.attention.query",
    "attn/key": "attention.attention.key",
    "attn/value": "attention.attention.value",
    "attn/out": "attention.output.dense",
}
"""What transformers 4 calls those of attention."""

_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}
_OUTSIDE = {
    **EMBEDDINGS,
    "dist_token": "embeddings.distillation_token",
    "pre_logits": "pooler.dense",
    "head_dist": "distillation_classifier",
}
_5 = {**_OUTSIDE, **numbered("layers.{i}", {**_NORMS, **BLOCK_5})}
_4 = {
    **_OUTSIDE,
    **numbered("encoder.layer.{i}", {
        **_NORMS, **ATTENTION_4, "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense",
    }),
}  # fmt: skip

_COMMON = {
    "renames": ((r"^(vit|deit)\.", ""), (r"^cls_classifier\.", "classifier.")),
    "ignored": (r"decoder\..*", r"embeddings\.mask_token"),  # of pretraining
    "stated": hugging_face_config.stated,
    "defaults": {"norm_epsilon": 1e-12},
    "resize": "torch_bicubic",
}

LAYOUTS = {
    "transformers4": Layout("Hugging Face transformers 4", _4, **_COMMON),
    "transformers5": Layout("Hugging Face transformers 5", _5, **_COMMON),
}
