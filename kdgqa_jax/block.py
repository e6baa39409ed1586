"""The transformer block of a ViT and its parts. Letters as in vit.py."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kdgqa_jax import sharding
from kdgqa_jax.attention import AttentionConfig, GroupedQueryAttention

Array = jax.Array

_kernel_init = nn.initializers.xavier_uniform()  # as the original ViT has it


def drop_path(x: Array, rate: Array | float, rng: Array) -> Array:
    """Stochastic depth: zero the branch BTD of random images and scale up that of the others."""
    kept = jax.random.bernoulli(rng, 1.0 - rate, (x.shape[0], 1, 1))
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Exact GELU, x/2 (1 + erf(x / sqrt 2)), as timm has it.

    Not `nn.gelu(approximate=False)`: that takes erfc, which costs several times as much on CPUs.
    Computed in float32; what is kept for the backward pass has the dtype of `x`.
    """
    wide = x.astype(jnp.float32)  # 1 + erf cancels where x is well below zero
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    slope = _normal_cdf(wide) + wide * jnp.exp(-0.5 * jnp.square(wide)) * (2.0 * math.pi) ** -0.5
    return gelu(x), slope.astype(x.dtype) * tangent


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


class Mlp(nn.Module):
    """fc1, erf GELU, fc2: BTD -> BTD."""

    mlp_width: int
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        width = x.shape[-1]
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": _kernel_init}
        x = checkpoint_name(nn.Dense(self.mlp_width, name="fc1", **common)(x), "fc1")
        x = gelu(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(width, name="fc2", **common)(x)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Block(nn.Module):
    """Pre-norm transformer block: BTD -> BTD (and None, the empty output of a scan)."""

    mlp_width: int
    attention: AttentionConfig
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        drop_path_rate: Array | float | None,
        train: bool,
        step: Array | int | None,
        mask: Array | None,
    ) -> tuple[Array, None]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def residual(x: Array, branch: Array) -> Array:
            if train and drop_path_rate is not None:
                branch = drop_path(branch, drop_path_rate, self.make_rng("dropout"))
            return checkpoint_name(sharding.split_batch(x + branch), "stream")

        attention = GroupedQueryAttention(
            self.attention, dropout=self.dropout, kernel_init=_kernel_init, name="attn", **common
        )

        def normalised(x: Array, name: str) -> Array:
            return sharding.split_batch(layer_norm(self.norm_epsilon, name, **common)(x))

        y = normalised(x, "norm1")
        x = residual(x, attention(y, train=train, step=step, mask=mask))
        y = normalised(x, "norm2")
        return residual(x, Mlp(self.mlp_width, self.dropout, name="mlp", **common)(y, train)), None


def layer_norm(
    epsilon: float, name: str | None = None, dtype: Any = None, param_dtype: Any = jnp.float32
) -> nn.LayerNorm:
    """LayerNorm; statistics in float32.

    In half precision the variance is E[x^2] - E[x]^2, one pass over the tokens: float32 sums lose
    nothing of values with 8 or 11 bits as long as the mean is not a hundred times the deviation.
    """
    half = dtype is not None and jnp.dtype(dtype).itemsize == 2
    return nn.LayerNorm(
        epsilon=epsilon, use_fast_variance=half, name=name, dtype=dtype, param_dtype=param_dtype
    )
