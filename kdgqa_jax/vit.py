"""Vision Transformer with grouped query attention, timm semantics.

Pre-norm blocks, LayerNorm eps 1e-6, exact (erf) GELU, qkv bias, class token, learned position
embedding. `create("S/16", attention="kdgqa", num_kv_heads=3)` builds a Flax module.

    B  batch    T  tokens (class token first, then the patches row by row)    D  model width
    L  layers   N  query heads    K  key/value heads    M  MLP width
"""

import dataclasses
import functools
import numbers
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from kdgqa_jax import layers, sharding
from kdgqa_jax.attention import GroupedQueryAttention, variant_name
from kdgqa_jax.block import Block, layer_norm
from kdgqa_jax.errors import UserError, check_rates, one_line, unknown

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
        "query", "key", "value", "heads", "stream", "fc1"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each block only
}

OF_THE_PROGRAM = ("scan_layers", "remat", "implementation", "expansion")
"""Options that change numbers by rounding only, and which random numbers a layer draws."""

OF_THE_RUN = ("dropout", "attn_dropout", "drop_path", "dtype", "param_dtype", *OF_THE_PROGRAM)
"""Options that say how to train and compute, not what: a run takes them from its own config."""

SCANNED = ("cpu",)
"""Platforms where `scan_layers` None scans. CPUs add residual streams up again in each unrolled
layer; accelerators keep more of a scan than they need (docs/speed.md)."""

_COLLECTIONS = ("params", "norm_stats", "given", "grouping", "intermediates", "inputs")

_CHOICES = {
    "pool": ("token", "avg"),
    "distillation": ("none", "token", "head"),
    "remat": REMAT_POLICIES,
}


class VisionTransformer(nn.Module):
    """ViT whose attention is any variant of `attention.VARIANTS`.

    Attributes:
      width: D.
      depth: L.
      mlp_width: M.
      attention: fields of `GroupedQueryAttention` by name, num_heads among them.
      patch_size: side of a patch in pixels.
      image_size: side of the images in pixels, or (height, width); multiples of patch_size.
      num_classes: width of the head; 0: no head, the pooled features are returned.
      pool: "token" (class token after the final norm) or "avg" (mean over the patch tokens, then
        a norm named `fc_norm`, as timm has it).
      class_token: the model has a class token; "token" pooling needs it.
      distillation: DeiT's second token: "none", "token" (it is there, classes are read from the
        class token alone) or "head" (it has a head of its own; the logits are the mean of both).
      representation_size: width of a tanh layer `pre_logits` between the pooled features and the
        head, as models pretrained on ImageNet-21k may have it; 0: none.
      norm_epsilon: of every LayerNorm.
      dropout: after the position embedding, the attention output and the MLP layers.
      drop_path: stochastic depth rate of the last block; it grows linearly from 0 at the first.
      scan_layers: one compiled block for all layers (`blocks` with a leading L axis) instead of L
        of them (`blocks_0`..); `stack_layers` and `unstack_layers` convert between the two. None:
        parameters as with False; `vit.apply` scans on the platforms in `SCANNED`.
      remat: a name in `REMAT_POLICIES`.
      dtype: of the computation; None: that of inputs and parameters.
      param_dtype: of the parameters.
    """

    width: int
    depth: int
    mlp_width: int
    attention: FrozenDict[str, Any]
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    num_classes: int = 1000
    pool: str = "token"
    class_token: bool = True
    distillation: str = "none"
    representation_size: int = 0
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    scan_layers: bool | None = False
    remat: str = "none"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size
        return tuple(size) if isinstance(size, list | tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the distillation token."""
        return int(self.class_token) + (self.distillation != "none")

    @property
    def block_fields(self) -> dict[str, Any]:
        """Fields of `block.Block`, which all layers share."""
        return {
            "mlp_width": self.mlp_width,
            "attention": self.attention,
            "norm_epsilon": self.norm_epsilon,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }

    def setup(self) -> None:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.patch_embed = nn.Conv(
            self.width,
            (self.patch_size, self.patch_size),
            strides=(self.patch_size, self.patch_size),
            padding="VALID",
            **common,
        )
        token_init = (nn.initializers.normal(1e-6), (1, 1, self.width), self.param_dtype)
        if self.class_token:
            self.cls_token = self.param("cls_token", *token_init)
        if self.distillation != "none":
            self.dist_token = self.param("dist_token", *token_init)
        length = self.grid[0] * self.grid[1] + self.num_prefix_tokens
        self.pos_embed = self.param(
            "pos_embed",
            nn.initializers.normal(self.width**-0.5),
            (1, length, self.width),
            self.param_dtype,
        )
        self.pos_dropout = nn.Dropout(self.dropout)

        block = Block
        if self.remat != "none":
            block = nn.remat(
                Block,
                policy=REMAT_POLICIES[self.remat],
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
        final_norm = layer_norm(self.norm_epsilon, **common)
        self.norm = final_norm if self.pool == "token" else None
        self.fc_norm = final_norm if self.pool == "avg" else None
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
        prefix = [self.cls_token] if self.class_token else []
        prefix += [self.dist_token] if self.distillation != "none" else []
        prefix = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], 1, self.width)) for t in prefix]
        x = jnp.concatenate([*prefix, x], axis=1)
        return x + self.pos_embed.astype(x.dtype)

    def features(
        self,
        images: Array,
        *,
        train: bool = False,
        step: Array | int | None = None,
        mask: Array | None = None,
    ) -> Array:
        """All tokens BTD, after the final norm where `pool` is "token". Arguments as `__call__`."""
        x = self.pos_dropout(self.embed(images), deterministic=not train)
        x = sharding.split_batch(x)
        rates = [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]
        if self.scan_layers:
            rates = jnp.asarray(rates, jnp.float32) if self.drop_path else None
            x, _ = self.blocks(x, rates, train, step, mask)
        else:
            for block, rate in zip(self.blocks, rates, strict=True):
                x, _ = block(x, rate if rate else None, train, step, mask)
        return self.norm(x) if self.norm is not None else x

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
        if self.pool == "token":
            x = tokens[:, 0]
        else:
            x = self.fc_norm(jnp.mean(tokens[:, self.num_prefix_tokens :], axis=1))
        if self.representation_size:
            x = jnp.tanh(self.pre_logits(x))
        if self.num_classes:
            x = self.head(x)
            if self.distillation == "head":
                x = (x + self.head_dist(tokens[:, 1])) / 2
        return x.astype(jnp.float32)


def _field_names(module: type) -> set[str]:
    return {field.name for field in dataclasses.fields(module)} - {"parent", "name"}


_VIT_FIELDS = _field_names(VisionTransformer)
_ATTENTION_FIELDS = _field_names(GroupedQueryAttention) - _VIT_FIELDS - {"kernel_init"}

_KINDS = {int: numbers.Integral, float: numbers.Real, str: str, bool: bool}
_OPTION_KINDS = {
    field.name: _KINDS[kind]
    for module in (VisionTransformer, GroupedQueryAttention)
    for field in dataclasses.fields(module)
    for kind in _KINDS
    if field.type in (kind, kind | None)
}
"""What the value of an option has to be, where that is a number, a string or a flag."""


def _check_kinds(options: dict[str, Any]) -> None:
    for name, value in options.items():
        kind = _OPTION_KINDS.get(name)
        if kind is None or value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = next(k.__name__ for k, v in _KINDS.items() if v is kind)
            raise UserError(f"model option {name}={value!r} must be of type {expected}")


_DTYPES = {"dtype": None, "param_dtype": "float32"}  # None: that of inputs and parameters


def _dtype_name(option: str, value: Any) -> str | None:
    try:
        dtype = None if value is None else jnp.dtype(value)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses texts such as "2f4"
        dtype = jnp.dtype(bool)
    if dtype is None and option == "dtype":
        return None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        shown = one_line(repr(value), 80)
        raise UserError(f"model option {option}={shown} must be float32, bfloat16 or float16")
    return dtype.name


def create(name: str, *, attention: str = "mha", **options: Any) -> VisionTransformer:
    """A ViT by name.

    Args:
      name: SIZE/PATCH such as "S/16", "B/16", "L/16", "Ti/16", "mu/2"; SIZE alone means patch 16.
        SIZE "custom" has no numbers of its own: give width, depth, num_heads and mlp_width.
      attention: a name in `attention.VARIANTS`, or "mhsa".
      **options: any field of `VisionTransformer` (num_classes, image_size, scan_layers, drop_path,
        dtype, ...) or of `GroupedQueryAttention` (num_kv_heads, window, beta, attn_dropout, ...).

    Returns:
      The module; `init_variables` makes its variables.

    Raises:
      UserError: an unknown name or option, or options that do not fit together.
    """
    match = re.fullmatch(r"([A-Za-z]+)(?:/(\d+))?", name)
    if not match or match[1] not in (*SIZES, "custom"):
        raise unknown("model", name, [f"{size}/PATCH" for size in (*SIZES, "custom")])
    fields: dict[str, Any] = dict(SIZES.get(match[1], {}), patch_size=int(match[2] or 16))
    fields |= options
    missing = [option for option in SIZES["S"] if option not in fields]
    if missing:
        raise UserError(f"model {name!r} needs the options {', '.join(missing)}")
    for option in fields:
        if option not in _VIT_FIELDS | _ATTENTION_FIELDS:
            raise unknown("model option", option, sorted(_VIT_FIELDS | _ATTENTION_FIELDS))
    _check_kinds(fields)
    attention_fields = {k: fields.pop(k) for k in list(fields) if k in _ATTENTION_FIELDS}
    layer = GroupedQueryAttention(attention=attention, **attention_fields)
    num_kv_heads = layer.check()
    if fields["width"] % layer.num_heads:
        raise UserError(
            f"width {fields['width']} is not a multiple of {layer.num_heads} query heads"
        )
    if isinstance(fields.get("image_size"), list):
        fields["image_size"] = tuple(fields["image_size"])
    for option in ("dtype", "param_dtype"):
        fields[option] = _dtype_name(option, fields.get(option, _DTYPES[option]))
    attention_fields = {name: getattr(layer, name) for name in _ATTENTION_FIELDS}  # defaults too
    attention_fields |= {"attention": variant_name(attention), "num_kv_heads": num_kv_heads}
    model = VisionTransformer(attention=FrozenDict(attention_fields), **fields)
    for option, known in _CHOICES.items():
        if getattr(model, option) not in known:
            raise unknown(option, getattr(model, option), known)
    if model.distillation != "none" and model.pool != "token":
        raise UserError(f'distillation={model.distillation!r} needs pool "token"')
    for option in ("width", "depth", "mlp_width", "patch_size"):
        if getattr(model, option) < 1:
            raise UserError(f"model option {option}={getattr(model, option)} must be at least 1")
    shape = model.image_shape
    whole = len(shape) == 2 and all(isinstance(side, numbers.Integral) for side in shape)
    if not whole or any(side < 1 or side % model.patch_size for side in shape):
        raise UserError(
            f"image size {shape} must be positive multiples of the patch size {model.patch_size}:"
            " a side, or (height, width)"
        )
    for option in ("num_classes", "representation_size"):
        if getattr(model, option) < 0:
            raise UserError(f"{option}={getattr(model, option)} must not be negative; 0: none")
    check_rates(dropout=model.dropout, drop_path=model.drop_path)
    if model.pool == "token" and not model.class_token:
        raise UserError('pool "token" needs class_token=True; use pool "avg" without a class token')
    return model


def arguments(model: VisionTransformer) -> dict[str, Any]:
    """Every option of `create` but the name, at its value in a model: JSON values.

    `create("custom", **arguments(model)) == model` for a model that `create` has made.
    """
    fields = {name: getattr(model, name) for name in sorted(_VIT_FIELDS - {"attention"})}
    return {**fields, **dict(sorted(model.attention.items()))}


def init_variables(model: VisionTransformer, rng: Array, channels: int = 3) -> dict[str, Any]:
    """{"params": ..., and for DGQA "norm_stats": ...}, made by one jitted initialisation.

    The same numbers whether layers are scanned or not.
    """
    scanned = model.clone(scan_layers=True)
    layout = layers.stack_layers if model.scan_layers else layers.unstack_layers

    @jax.jit
    def initialise(rng: Array) -> dict[str, Any]:
        variables = scanned.init(rng, jnp.zeros((1, *model.image_shape, channels), jnp.float32))
        return {name: layout(tree) for name, tree in variables.items()}

    return initialise(rng)


@functools.lru_cache(maxsize=8)
def variable_shapes(model: VisionTransformer, channels: int = 3) -> dict[str, Any]:
    """Shapes and dtypes of what `init_variables` gives, without making it.

    Traced in the time of one layer, whatever sizes the model has.
    """
    scanned = model.clone(scan_layers=True)
    shapes = jax.eval_shape(lambda: init_variables(scanned, jax.random.key(0), channels))
    if model.scan_layers:
        return shapes

    def unstacked(tree: dict[str, Any]) -> dict[str, Any]:
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree["blocks"])
        rest = {name: branch for name, branch in tree.items() if name != "blocks"}
        return rest | {f"blocks_{i}": layer for i in range(model.depth)}

    return {name: unstacked(tree) for name, tree in shapes.items()}


def init_norm_stats(model: VisionTransformer) -> dict[str, Any]:
    """The collection `norm_stats` as it starts: no norms, equal allocations; {} without memory."""
    layer = GroupedQueryAttention(**model.attention)
    if not layer.has_memory:
        return {}
    tokens = jnp.zeros((1, 1, model.width))
    # Parameters are not returned, so none is computed.
    memory = jax.jit(lambda: layer.init(jax.random.key(0), tokens)["norm_stats"])()
    blocks = {f"blocks_{i}": {"attn": jax.tree.map(jnp.copy, memory)} for i in range(model.depth)}
    return layers.stack_layers(blocks) if model.scan_layers else blocks


def apply(
    model: VisionTransformer, variables: dict[str, Any], images: Array, **options: Any
) -> tuple[Array, dict[str, Any]]:
    """`model.apply` with layers scanned or not as `scan_layers` and the platform have it.

    Args:
      model: any variant.
      variables: in the layout of the model.
      images: (B, height, width, channels) float, normalised.
      **options: those of `model.apply`, `mutable` among them.

    Returns:
      (logits, the mutable collections in the layout of the model).
    """
    if model.scan_layers is not None or sharding.platform() not in SCANNED:
        return model.apply(variables, images, **options)
    stacked = {name: layers.stack_layers(tree) for name, tree in variables.items()}
    logits, collections = model.clone(scan_layers=True).apply(stacked, images, **options)
    return logits, {name: layers.unstack_layers(tree) for name, tree in collections.items()}


def apply_in_evaluation(
    model: VisionTransformer,
    variables: dict[str, Any],
    images: Array,
    mask: Array | None = None,
    collect: Sequence[str] = (),
) -> tuple[Array, dict[str, Any]]:
    """(logits, collections "grouping" and `collect`): the one way in which models are evaluated.

    Args:
      model: any variant.
      variables: {"params": ..., and for DGQA "norm_stats": ...}.
      images: (B, height, width, channels) float, normalised.
      mask: (B,) bool, False for padded images.
      collect: further collections that the layers write.
    """
    return apply(
        model,
        variables,
        images,
        mask=mask,
        mutable=["grouping", *collect],
        rngs={"noise": jax.random.key(0)},  # for pgqa with noise_at_eval only
    )
