"""Vision Transformer with grouped query attention, timm semantics.

By default pre-norm blocks, LayerNorm eps 1e-6, exact (erf) GELU, qkv bias, class token, learned
position embedding. `create("S/16", attention="kdgqa", num_kv_heads=3)` builds a Flax module.

    B  batch    T  tokens (class, distillation, registers; patches row by row)    D  model width
    L  layers   N  query heads    K  key/value heads    M  MLP width
"""

import dataclasses
import numbers
import re
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from kdgqa_jax import attention as attention_lib
from kdgqa_jax import options, sharding
from kdgqa_jax.attention import GROUPS, AttentionConfig, configure
from kdgqa_jax.block import Block, BlockConfig
from kdgqa_jax.errors import (
    UserError,
    check_not_negative,
    check_positive,
    check_rate,
    one_line,
    unknown,
)
from kdgqa_jax.options import ARCHITECTURE, CONVERSION, PROGRAM, RUN, SIZE, option
from kdgqa_jax.pools import NORMALISED, POOLS, AttentionPool
from kdgqa_jax.variables import (
    apply,
    apply_in_evaluation,
    init_norm_stats,
    init_variables,
    variable_shapes,
)

__all__ = [
    "REMAT_POLICIES",
    "SIZES",
    "VisionTransformer",
    "apply",
    "apply_in_evaluation",
    "arguments",
    "create",
    "init_norm_stats",
    "init_variables",
    "known_options",
    "variable_shapes",
]

Array = jax.Array

SIZES: dict[str, dict[str, int]] = {
    "mu": {"width": 64, "depth": 4, "num_heads": 8, "mlp_width": 128},  # for tests and the demo
    "mini": {"width": 128, "depth": 2, "num_heads": 8, "mlp_width": 256},  # for studies on a CPU
    "Ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_width": 768},
    "S": {"width": 384, "depth": 12, "num_heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "num_heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_width": 4096},
}

REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep all activations
    "dots": jax.checkpoint_policies.dots_saveable,  # keep the results of matrix products
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of projections
    "names": jax.checkpoint_policies.save_only_these_names(  # as dots_no_batch, in fewer arrays
        "query", "key", "value", "heads", "stream", "fc1", "gate"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each block only
}
"""All keep the group index besides: a backward pass has the groups of its forward pass. Computed
again they would need the norms of the global batch once more, and might round apart."""

_COLLECTIONS = ("params", "norm_stats", "given", "grouping", "intermediates", "inputs")


class VisionTransformer(nn.Module):
    """ViT whose attention is any variant of `attention.VARIANTS`; options in timm's terms.

    Attributes:
      width: D.
      depth: L.
      attention: what the attention of each block is, made by `attention.configure`.
      block: what a block is besides its attention.
      patch_size: side of a patch in pixels.
      image_size: side of the images in pixels, or (height, width); multiples of patch_size.
      num_classes: width of the head; 0: no head, the pooled features are returned.
      patch_bias: the patch embedding has a bias.
      embed_norm: a norm after the patch embedding.
      class_token: the model has a class token; "token" pooling needs it.
      distillation: DeiT's second token: "none", "token" (it is there, classes are read from the
        class token alone) or "head" (it has a head of its own; the logits are the mean of both).
      reg_tokens: register tokens, after the class token (arXiv 2309.16588).
      no_embed_class: the position embedding is that of the patches alone.
      pre_norm: a norm before the first block.
      final_norm: a norm after the last block.
      norm_pooled: it is of what is pooled instead of all tokens (timm's fc_norm); None: for the
        pools in `pools.NORMALISED`.
      pool: a name in `pools.POOLS`.
      pool_include_prefix: pools of patch tokens get the tokens before them, too.
      representation_size: width of a tanh layer `pre_logits` between the pooled features and the
        head, as models pretrained on ImageNet-21k may have it; 0: none.
      dropout: after the position embedding, the attention output and the MLP layers.
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
      scan_layers: one compiled block for all layers (`blocks` with a leading L axis) instead of L
        of them (`blocks_0`..); `stack_layers` and `unstack_layers` convert between the two. None:
        parameters as with False; `vit.apply` scans on the platforms in `variables.SCANNED`.
      remat: a name in `REMAT_POLICIES`.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
    """

    width: int = option(role=SIZE, check=check_positive)
    depth: int = option(role=SIZE, check=check_positive)
    attention: AttentionConfig = option(role=CONVERSION)
    block: BlockConfig
    patch_size: int = option(16, SIZE, check=check_positive)
    image_size: int | tuple[int, int] = option(224, CONVERSION)
    num_classes: int = option(1000, SIZE, check=check_not_negative)
    patch_bias: bool = option(True, ARCHITECTURE)
    embed_norm: bool = option(False, ARCHITECTURE)
    class_token: bool = option(True, ARCHITECTURE)
    distillation: str = option("none", ARCHITECTURE, choices=("none", "token", "head"))
    reg_tokens: int = option(0, ARCHITECTURE, check=check_not_negative)
    no_embed_class: bool = option(False, ARCHITECTURE)
    pre_norm: bool = option(False, ARCHITECTURE)
    final_norm: bool = option(True, ARCHITECTURE)
    norm_pooled: bool | None = option(None, ARCHITECTURE)
    pool: str = option("token", ARCHITECTURE, choices=POOLS)
    pool_include_prefix: bool = option(False, ARCHITECTURE)
    representation_size: int = option(0, ARCHITECTURE, check=check_not_negative)
    dropout: float = option(0.0, RUN, check=check_rate)
    drop_path: float = option(0.0, RUN, check=check_rate)
    scan_layers: bool | None = option(False, PROGRAM)
    remat: str = option("none", PROGRAM, choices=REMAT_POLICIES)
    dtype: Any = option(None, RUN)
    param_dtype: Any = option(jnp.float32, RUN)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        return cast(tuple[int, int], sides)  # which `create` checks

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: those of class and distillation, and registers."""
        return int(self.class_token) + (self.distillation != "none") + self.reg_tokens

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Those of them that the position embedding has an entry for."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def head_widths(self) -> tuple[int, int]:
        """H of query and key heads, and V of value heads."""
        return self.attention.widths_of_heads(self.width)

    @property
    def normalises_pooled(self) -> bool:
        """The final norm is of what is pooled, not of all tokens."""
        return self.pool in NORMALISED if self.norm_pooled is None else self.norm_pooled

    @property
    def block_fields(self) -> dict[str, Any]:
        """Fields of `block.Block`, which all layers share."""
        names = ("attention", "dropout", "dtype", "param_dtype")
        return {"config": self.block, **{name: getattr(self, name) for name in names}}

    def setup(self) -> None:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embed = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            use_bias=self.patch_bias,
            **common,
        )
        self.patch_norm = self.block.make_norm(**common) if self.embed_norm else None
        token_init = (nn.initializers.normal(1e-6), (1, 1, self.width), self.param_dtype)
        if self.class_token:
            self.cls_token = self.param("cls_token", *token_init)
        if self.distillation != "none":
            self.dist_token = self.param("dist_token", *token_init)
        if self.reg_tokens:
            shape = (1, self.reg_tokens, self.width)
            self.reg_token = self.param("reg_token", token_init[0], shape, self.param_dtype)
        length = self.grid[0] * self.grid[1] + self.num_embedded_prefix_tokens
        self.pos_embed = self.param(
            "pos_embed",
            nn.initializers.normal(self.width**-0.5),
            (1, length, self.width),
            self.param_dtype,
        )
        self.pos_dropout = nn.Dropout(self.dropout)
        self.norm_pre = self.block.make_norm(**common) if self.pre_norm else None

        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block,
                policy=jax.checkpoint_policies.save_from_both_policies(
                    REMAT_POLICIES[self.remat],
                    jax.checkpoint_policies.save_only_these_names(GROUPS),
                ),
                static_argnums=(3,),  # train
                prevent_cse=not self.scan_layers,
            )
        if self.scan_layers:
            block = nn.scan(
                block,
                variable_axes=dict.fromkeys(_COLLECTIONS, 0),
                split_rngs={"params": True, "dropout": True, "noise": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
                length=self.depth,
            )
            self.blocks = block(**self.block_fields)
        else:
            self.blocks = [block(**self.block_fields) for _ in range(self.depth)]
        final_norm = self.block.make_norm(**common) if self.final_norm else None
        self.norm = None if self.normalises_pooled else final_norm
        self.fc_norm = final_norm if self.normalises_pooled else None
        if self.pool == "map":
            self.attn_pool = AttentionPool(self.attention.num_heads, self.block, **common)
        # Here is one product per image: exact logits cost nothing.
        exact = {"dtype": jnp.float32, "param_dtype": self.param_dtype}
        if self.representation_size:
            self.pre_logits = nn.Dense(self.representation_size, **exact)
        if self.num_classes:
            exact["kernel_init"] = nn.initializers.zeros
            self.head = nn.Dense(self.num_classes, **exact)
            if self.distillation == "head":
                self.head_dist = nn.Dense(self.num_classes, **exact)

    def embed(self, images: Array) -> Array:
        """The tokens BTD that the first layer gets. Raises UserError for another image size."""
        if images.ndim != 4 or images.shape[1:3] != self.image_shape:
            raise UserError(
                f"expected images (batch, {self.image_shape[0]}, {self.image_shape[1]}, channels),"
                f" got shape {images.shape}"
            )
        x = self.patch_embed(images)
        x = x.reshape(x.shape[0], -1, self.width)  # BTD
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        position = self.pos_embed.astype(x.dtype)
        if self.no_embed_class:
            x += position
        prefix = [self.cls_token] if self.class_token else []
        prefix += [self.dist_token] if self.distillation != "none" else []
        prefix += [self.reg_token] if self.reg_tokens else []
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)
        return x if self.no_embed_class else x + position

    def features(
        self,
        images: Array,
        *,
        train: bool = False,
        step: Array | int | None = None,
        mask: Array | None = None,
    ) -> Array:
        """All tokens BTD, after the final norm if it is theirs. Arguments as `__call__`."""
        x = self.pos_dropout(self.embed(images), deterministic=not train)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        x = sharding.split_batch(x)
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]
        if self.scan_layers:
            rates = jnp.asarray(rates, jnp.float32) if self.drop_path else None
            x, _ = self.blocks(x, rates, train, step, mask)
        else:
            for block, rate in zip(self.blocks, rates, strict=True):
                x, _ = block(x, rate if rate else None, train, step, mask)
        return self.norm(x) if self.norm is not None else x

    def pooled(self, tokens: Array, train: bool = False) -> Array:
        """The tokens BTD of `features` -> one vector per image, BD, normalised."""
        if self.pool != "token" and not self.pool_include_prefix:
            tokens = tokens[:, self.num_prefix_tokens :]
        x = self.attn_pool(tokens, train) if self.pool == "map" else POOLS[self.pool](tokens)
        return x if self.fc_norm is None else self.fc_norm(x)

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        step: Array | int | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Logits (B, num_classes) float32, or pooled features (B, D) where num_classes is 0.

        Args:
          images: (B, height, width, channels) float, normalised.
          train: apply dropout, drop path and noise, and update `norm_stats` (needs
            mutable=["norm_stats"] for DGQA). RNG streams: `dropout`, and `noise` for PGQA.
          step: the global optimizer step; needed by DGQA in training.
          mask: (B,) bool, False for padded images: they never count in key norms.

        Raises:
          UserError: images of another size.
        """
        tokens = self.features(images, train=train, step=step, mask=mask)
        x = self.pooled(tokens, train)
        if self.representation_size:
            x = jnp.tanh(self.pre_logits(x))
        if self.num_classes:
            x = self.head(x)
            if self.distillation == "head":
                x = (x + self.head_dist(tokens[:, 1])) / 2
        return x.astype(jnp.float32)


_DTYPES = {"dtype": None, "param_dtype": "float32"}  # None: that of inputs and parameters


def _dtype_name(name: str, value: Any) -> str | None:
    try:
        dtype = None if value is None else jnp.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses texts such as "2f4"
        dtype = jnp.dtype(bool)
    if dtype is None and name == "dtype":
        return None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = one_line(repr(value), 80)
        raise UserError(f"model option {name}={shown} must be float32, bfloat16 or float16")
    return dtype.name


def known_options() -> dict[str, dataclasses.Field]:
    """The options of `create` by name: of the ViT, of its blocks, and of all variants."""
    own = options.union([VisionTransformer, BlockConfig])
    return own | attention_lib.known_options()


def create(name: str, *, attention: str = "mha", **values: Any) -> VisionTransformer:
    """A ViT by name.

    Args:
      name: SIZE/PATCH such as "S/16", "B/16", "L/16", "Ti/16", "mu/2"; SIZE alone means patch 16.
        SIZE "custom" has no numbers of its own: give width, depth, num_heads and mlp_width.
      attention: a name in `attention.VARIANTS`, or "mhsa".
      **values: any field of `VisionTransformer` (num_classes, image_size, scan_layers, drop_path,
        dtype, ...) or option of `attention.configure` (num_kv_heads, window, beta, ...).

    Returns:
      The module; `init_variables` makes its variables.

    Raises:
      UserError: an unknown name or option, or options that do not fit together.
    """
    match = re.fullmatch(r"([A-Za-z]+)(?:/(\d+))?", name)
    if not match or match[1] not in (*SIZES, "custom"):
        raise unknown("model", name, [f"{size}/PATCH" for size in (*SIZES, "custom")])
    values = {**SIZES.get(match[1], {}), "patch_size": int(match[2] or 16)} | values
    missing = [needed for needed in SIZES["S"] if needed not in values]
    if missing:
        raise UserError(f"model {name!r} needs the options {', '.join(missing)}")
    known = known_options()
    for given in values:
        if given not in known:
            raise unknown("model option", given, sorted(known))
    options.check_kinds(known, values)
    fields = options.chosen(VisionTransformer, values)
    block = options.chosen(BlockConfig, values)
    if isinstance(fields.get("image_size"), list):
        fields["image_size"] = tuple(fields["image_size"])
    for dtype, default in _DTYPES.items():
        fields[dtype] = _dtype_name(dtype, fields.get(dtype, default))
    layer = {name: x for name, x in values.items() if name not in fields | block}
    model = VisionTransformer(
        attention=configure(attention, **layer), block=BlockConfig(**block), **fields
    )
    options.check(model)
    _check_together(model)
    return model


def _check_together(model: VisionTransformer) -> None:
    """Raise UserError for options that do not fit together."""
    model.attention.widths_of_heads(model.width)
    if model.pool == "map" and model.width % model.attention.num_heads:
        raise UserError(
            f'pool "map" needs a width that is a multiple of {model.attention.num_heads} heads, not'
            f" {model.width}"
        )
    if model.distillation != "none" and model.pool != "token":
        raise UserError(f'distillation={model.distillation!r} needs pool "token"')
    shape = model.image_shape
    whole = len(shape) == 2 and all(isinstance(side, numbers.Integral) for side in shape)
    if not whole or any(side < 1 or side % model.patch_size for side in shape):
        raise UserError(
            f"image size {shape} must be positive multiples of the patch size {model.patch_size}:"
            " a side, or (height, width)"
        )
    if model.pool == "token" and not model.class_token:
        raise UserError('pool "token" needs class_token=True; use pool "avg" without a class token')
    if model.no_embed_class and model.distillation != "none":
        raise UserError(f"distillation={model.distillation!r} needs no_embed_class=False")


def arguments(model: VisionTransformer) -> dict[str, Any]:
    """Every option of `create` but the name, at its value in a model: JSON values.

    `create("custom", **arguments(model)) == model` for a model that `create` has made.
    """
    fields = {n: getattr(part, n) for part in (model, model.block) for n in options.fields(part)}
    return dict(sorted((fields | model.attention.arguments()).items()))
