"""The transformer block of a ViT, with the orders of its parts as a table. Letters as in vit.py."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kdgqa_jax import options, sharding
from kdgqa_jax.attention import AttentionConfig, GroupedQueryAttention
from kdgqa_jax.errors import UserError, check_not_negative, check_positive
from kdgqa_jax.layers import ACTIVATIONS, NORMS, Mlp, kernel_init
from kdgqa_jax.options import ARCHITECTURE, SIZE, option

Array = jax.Array
Branch = Callable[[Array], Array]


# --- the order of the parts ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What an order puts together: norms and layer scales by number, residual connections."""

    norm: Callable[[int, Array], Array]
    scale: Callable[[int, Array], Array]
    attention: Branch
    mlp: Branch
    add: Callable[[Array, Array], Array]


def _pre_norm(x: Array, part: _Parts) -> Array:
    x = part.add(x, part.scale(1, part.attention(part.norm(1, x))))
    return part.add(x, part.scale(2, part.mlp(part.norm(2, x))))


def _post_norm(x: Array, part: _Parts) -> Array:
    x = part.add(x, part.norm(1, part.attention(x)))
    return part.add(x, part.norm(2, part.mlp(x)))


def _parallel(x: Array, part: _Parts) -> Array:
    y = part.norm(1, x)
    return part.add(x, part.scale(1, part.attention(y) + part.mlp(y)))


ORDERS: dict[str, Callable[[Array, _Parts], Array]] = {
    "pre_norm": _pre_norm,  # as the original ViT
    "post_norm": _post_norm,  # norms of what is added (timm's ResPostBlock)
    "parallel": _parallel,  # attention and MLP beside each other (ViT-22B, arXiv 2302.05442)
}
"""How a block puts its parts together, by name."""


# --- the block ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a block is, besides its attention.

    Attributes:
      mlp_width: M.
      block: a name in `ORDERS`.
      activation: of the MLP, a name in `layers.ACTIVATIONS`.
      gated_mlp: the MLP has a gate, as SwiGLU.
      mlp_bias: the projections of the MLP have a bias.
      scale_mlp_norm: the MLP has a norm before its last projection.
      norm: a name in `layers.NORMS`, of all norms.
      norm_epsilon: of all norms.
      layer_scale: initial value of a factor per channel on each branch (LayerScale, arXiv
        2103.17239); 0: none.

    Raises:
      UserError: a value that is none.
    """

    mlp_width: int = option(role=SIZE, check=check_positive)
    block: str = option("pre_norm", ARCHITECTURE, choices=ORDERS)
    activation: str = option("gelu", ARCHITECTURE, choices=ACTIVATIONS)
    gated_mlp: bool = option(False, ARCHITECTURE)
    mlp_bias: bool = option(True, ARCHITECTURE)
    scale_mlp_norm: bool = option(False, ARCHITECTURE)
    norm: str = option("layernorm", ARCHITECTURE, choices=NORMS)
    norm_epsilon: float = option(1e-6, ARCHITECTURE)
    layer_scale: float = option(0.0, ARCHITECTURE, check=check_not_negative)

    def __post_init__(self) -> None:
        options.check(self)
        if self.block == "post_norm" and self.layer_scale:
            raise UserError(
                f"layer_scale={self.layer_scale} has no place in blocks of post_norm, whose norms"
                " scale what is added"
            )

    def make_norm(self, name: str | None = None, **dtypes: Any) -> nn.Module:
        """A norm of this kind; `dtypes`: dtype and param_dtype."""
        return NORMS[self.norm](self.norm_epsilon, name, **dtypes)


def drop_path(x: Array, rate: Array | float, rng: Array) -> Array:
    """Stochastic depth: zero the branch BTD of random images and scale up that of the others."""
    kept = jax.random.bernoulli(rng, 1.0 - rate, (x.shape[0], 1, 1))
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


class Block(nn.Module):
    """Transformer block: BTD -> BTD (and None, the empty output of a scan)."""

    config: BlockConfig
    attention: AttentionConfig
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
        config, width = self.config, x.shape[-1]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        make_norm = functools.partial(config.make_norm, **dtypes)

        def norm(number: int, x: Array) -> Array:
            return sharding.split_batch(make_norm(f"norm{number}")(x))

        def scale(number: int, branch: Array) -> Array:
            if not config.layer_scale:
                return branch
            init = nn.initializers.constant(config.layer_scale)
            factor = self.param(f"ls{number}", init, (width,), self.param_dtype)
            return branch * factor.astype(branch.dtype)

        def attention(x: Array) -> Array:
            layer = GroupedQueryAttention(
                self.attention,
                dropout=self.dropout,
                kernel_init=kernel_init,
                norm=make_norm,
                name="attn",
                **dtypes,
            )
            return layer(x, train=train, step=step, mask=mask)

        def mlp(x: Array) -> Array:
            layer = Mlp(
                config.mlp_width,
                config.activation,
                config.gated_mlp,
                config.mlp_bias,
                make_norm if config.scale_mlp_norm else None,
                self.dropout,
                name="mlp",
                **dtypes,
            )
            return layer(x, train)

        def add(x: Array, branch: Array) -> Array:
            if train and drop_path_rate is not None:
                branch = drop_path(branch, drop_path_rate, self.make_rng("dropout"))
            return checkpoint_name(sharding.split_batch(x + branch), "stream")

        return ORDERS[config.block](x, _Parts(norm, scale, attention, mlp, add)), None
