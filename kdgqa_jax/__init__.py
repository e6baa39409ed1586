"""Grouped query attention for Vision Transformers in JAX: GQA, KDGQA, DGQA and PGQA.

Importing this package needs jax and flax alone; data, plotting and checkpoint libraries are loaded
by the functions that use them.
"""

from kdgqa_jax import allocation, attention, vit
from kdgqa_jax.attention import GroupedQueryAttention, grouped_attention
from kdgqa_jax.version import __version__
from kdgqa_jax.vit import create

__all__ = [
    "GroupedQueryAttention",
    "__version__",
    "allocation",
    "attention",
    "create",
    "grouped_attention",
    "vit",
]
