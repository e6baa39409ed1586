"""Google's AugReg and original ViT checkpoints (.npz), whose arrays have the form of ours."""

from kdgqa_jax.convert.sources import timm
from kdgqa_jax.convert.sources.layout import Layout, numbered

_ATTENTION = "MultiHeadDotProductAttention_1"
_NAMES = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed": "embedding",
    **{
        ours: theirs.replace(".", "/", 1)
        for ours, theirs in numbered("Transformer/encoderblock_{i}", {
            "norm1": "LayerNorm_0",
            "attn/query": f"{_ATTENTION}/query",
            "attn/key": f"{_ATTENTION}/key",
            "attn/value": f"{_ATTENTION}/value",
            "attn/out": f"{_ATTENTION}/out",
            "norm2": "LayerNorm_2",
            "mlp/fc1": "MlpBlock_3/Dense_0",
            "mlp/fc2": "MlpBlock_3/Dense_1",
        }).items()
    },
    "norm": "Transformer/encoder_norm",
    "pre_logits": "pre_logits",
    "head": "head",
}  # fmt: skip

LAYOUTS = {
    "augreg": Layout(
        "Google AugReg", _NAMES, pytorch=False, stated=timm.stated, defaults={"norm_epsilon": 1e-6}
    )
}
