"""The variables of a ViT: made, described without being made, and applied.

Layers are stacked or not as `scan_layers` has it; where that is None, as the platform is faster.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kdgqa_jax import sharding, tree_utils

if TYPE_CHECKING:
    from kdgqa_jax.vit import VisionTransformer

Array = jax.Array

SCANNED = ("cpu",)
"""Platforms where `scan_layers` None scans. CPUs add residual streams up again in each unrolled
layer; accelerators keep more of a scan than they need (docs/speed.md)."""


def init_variables(model: "VisionTransformer", rng: Array, channels: int = 3) -> dict[str, Any]:
    """{"params": ..., and for DGQA "norm_stats": ...}, made by one jitted initialisation.

    The same numbers whether layers are scanned or not.
    """
    scanned = model.clone(scan_layers=True)
    layout = tree_utils.stack_layers if model.scan_layers else tree_utils.unstack_layers

    @jax.jit
    def initialise(rng: Array) -> dict[str, Any]:
        variables = scanned.init(rng, jnp.zeros((1, *model.image_shape, channels), jnp.float32))
        return {name: layout(tree) for name, tree in variables.items()}

    return initialise(rng)


@functools.lru_cache(maxsize=8)
def variable_shapes(model: "VisionTransformer", channels: int = 3) -> dict[str, Any]:
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


def init_norm_stats(model: "VisionTransformer") -> dict[str, Any]:
    """The collection `norm_stats` as it starts: no norms, equal allocations; {} without memory."""
    if not model.attention.has_memory:
        return {}
    initial = model.attention.initial_memory
    blocks = {f"blocks_{i}": {"attn": initial()} for i in range(model.depth)}
    return tree_utils.stack_layers(blocks) if model.scan_layers else blocks


def apply(
    model: "VisionTransformer", variables: dict[str, Any], images: Array, **options: Any
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
        logits, collections = model.apply(variables, images, **options)
        return logits, dict(collections)
    stacked = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
    logits, collections = model.clone(scan_layers=True).apply(stacked, images, **options)
    return logits, {name: tree_utils.unstack_layers(tree) for name, tree in collections.items()}


def apply_in_evaluation(
    model: "VisionTransformer",
    variables: dict[str, Any],
    images: Array,
    mask: Array | None = None,
    collect: Sequence[str] = (),
    method: Callable[..., Array] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """(logits, collections "grouping" and `collect`): the one way in which models are evaluated.

    Args:
      model: any variant.
      variables: {"params": ..., and for DGQA "norm_stats": ...}.
      images: (B, height, width, channels) float, normalised.
      mask: (B,) bool, False for padded images.
      collect: further collections that the layers write.
      method: (model, images, mask) -> what is returned in place of logits.
    """
    return apply(
        model,
        variables,
        images,
        mask=mask,
        method=method,
        mutable=["grouping", *collect],
        rngs={"noise": jax.random.key(0)},  # for pgqa with noise_at_eval only
    )
