"""The paper's released PyTorch code: timm's names with q, k and v apart, and DGQA's cache."""

from kdgqa_jax.convert.sources import timm
from kdgqa_jax.convert.sources.layout import Layout, numbered

_NAMES = {
    **timm.NAMES,
    **numbered("blocks.{i}", {
        "attn/query": "attn.q", "attn/key": "attn.k", "attn/value": "attn.v",
        "attn/key_norm": "attn.cache",  # in norm_stats
    }),
}  # fmt: skip

LAYOUTS = {
    "released": Layout(
        "released PyTorch code", _NAMES, renames=timm.RENAMES[:2], stated=timm.stated,
        defaults={"norm_epsilon": 1e-6}, only_plain=True,
    )
}  # fmt: skip
