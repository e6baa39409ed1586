"""From the tokens of a ViT to one vector per image: the table of pools. Letters as in vit.py."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kdgqa_jax.block import BlockConfig
from kdgqa_jax.kernels import grouped_attention
from kdgqa_jax.layers import Mlp, kernel_init

Array = jax.Array


def _average(tokens: Array) -> Array:
    return jnp.mean(tokens, axis=1)


def _largest(tokens: Array) -> Array:
    return jnp.max(tokens, axis=1)


def _average_and_largest(tokens: Array) -> Array:
    return 0.5 * (_largest(tokens) + _average(tokens))


POOLS: dict[str, Callable[[Array], Array] | None] = {
    "token": lambda tokens: tokens[:, 0],  # the class token
    "avg": _average,
    "max": _largest,
    "avgmax": _average_and_largest,
    "map": None,  # the module `AttentionPool`
}
"""By name: tokens BTD -> BD. All but "token" get the patch tokens, or with `pool_include_prefix`
all tokens."""

NORMALISED = ("avg", "max", "avgmax")
"""Pools whose result is normalised in place of the tokens, unless `norm_pooled` says so."""


class AttentionPool(nn.Module):
    """Multi-head attention of one learned query, and an MLP: BTD -> BD (arXiv 2106.04560).

    Attributes:
      num_heads: N.
      block: of the model: the MLP has its width and activation, the norm is of its kind.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    num_heads: int
    block: BlockConfig
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, train: bool) -> Array:
        width = tokens.shape[-1]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common = {**dtypes, "kernel_init": kernel_init}
        init = nn.initializers.truncated_normal(width**-0.5)
        latent = self.param("latent", init, (1, 1, width), self.param_dtype)
        latent = jnp.broadcast_to(latent.astype(tokens.dtype), (tokens.shape[0], 1, width))

        def heads(x: Array, name: str) -> Array:
            shape = (self.num_heads, width // self.num_heads)
            return nn.DenseGeneral(shape, name=name, **common)(x)

        query, key, value = heads(latent, "query"), heads(tokens, "key"), heads(tokens, "value")
        x = grouped_attention(query, key, value, implementation="xla")
        x = nn.DenseGeneral(width, axis=(-2, -1), name="out", **common)(x)
        mlp = Mlp(self.block.mlp_width, self.block.activation, name="mlp", **dtypes)
        x = x + mlp(self.block.make_norm("norm", **dtypes)(x), train)
        return x[:, 0]
