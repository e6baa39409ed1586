"""Norms, activations and MLPs of a ViT, each a table by name. Letters as in vit.py."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

kernel_init = nn.initializers.xavier_uniform()
"""Of the projections of a ViT, as the original one has it."""


# --- norms --------------------------------------------------------------------------------------


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


def rms_norm(
    epsilon: float, name: str | None = None, dtype: Any = None, param_dtype: Any = jnp.float32
) -> nn.RMSNorm:
    """RMSNorm; statistics in float32."""
    return nn.RMSNorm(epsilon=epsilon, name=name, dtype=dtype, param_dtype=param_dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": layer_norm, "rmsnorm": rms_norm}
"""By name: (epsilon, name, dtype, param_dtype) -> a module."""


# --- activations --------------------------------------------------------------------------------


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


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), as the first CLIP models have it."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": nn.gelu,
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
    "relu": nn.relu,
}


# --- MLPs ---------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """fc1, activation, fc2: BTD -> BTD.

    Attributes:
      mlp_width: M.
      activation: a name in `ACTIVATIONS`.
      gated: fc2(activation(gate(x)) * fc1(x)), as SwiGLU is with "silu".
      use_bias: of all projections.
      norm: makes a module that is applied before fc2, called "norm"; None: none.
      dropout: after the activation and after fc2.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    mlp_width: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm: Callable[[str], nn.Module] | None = None
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        width, activation = x.shape[-1], ACTIVATIONS[self.activation]
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        common |= {"use_bias": self.use_bias, "kernel_init": kernel_init}
        hidden = checkpoint_name(nn.Dense(self.mlp_width, name="fc1", **common)(x), "fc1")
        if self.gated:
            gate = checkpoint_name(nn.Dense(self.mlp_width, name="gate", **common)(x), "gate")
            hidden = activation(gate) * hidden
        else:
            hidden = activation(hidden)
        if self.norm is not None:
            hidden = self.norm("norm")(hidden)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        out = nn.Dense(width, name="fc2", **common)(hidden)
        return nn.Dropout(self.dropout, deterministic=not train)(out)
