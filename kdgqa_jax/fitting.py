"""How many images a device holds at once, by an estimate of what a training step keeps.

For its backward pass a step keeps activations of every token in every layer. How many is counted in
arrays of the model's width, by what is rematerialised.
"""

import math

import jax
import jax.numpy as jnp
import ml_collections

from kdgqa_jax import chips, vit

AUTO = -1
"""The `microbatch` of a config that goes by the device."""

KEPT = {
    "none": (16, 32),
    "dots": (16, 32),
    "dots_no_batch": (16, 16),
    "names": (16, 16),
    "full": (6, 6),
}
"""Arrays (B, T, D) of the computation's dtype that a layer keeps, by `model.remat`: of layers
unrolled and scanned. XLA's compiler for v5e says 13 to 15 and 31 to 32 of `none`, and 15 of a
scanned `dots_no_batch`; the others are taken from these."""

SHARE = 0.85
"""Of the memory of a device that programs get for the state and a step."""

IMAGE_COPIES = 6
"""Of the float32 images of a batch: as read, augmented, mixed, cut into patches."""


def bytes_per_image(model: vit.VisionTransformer) -> int:
    """What a training step keeps of one image."""
    tokens = math.prod(model.image_shape) // model.patch_size**2 + 1
    kept = KEPT[model.remat][bool(model.scan_layers)] * model.depth * tokens * model.width
    images = IMAGE_COPIES * 3 * math.prod(model.image_shape) * 4
    return kept * jnp.dtype(model.dtype).itemsize + images


def state_bytes(model: vit.VisionTransformer, ema: bool, mesh: jax.sharding.Mesh) -> int:
    """Parameters, two moments, gradients and by choice a moving average, on one device."""
    shapes = vit.variable_shapes(model, 3)["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    return 4 * count * (4 + ema) // (mesh.shape["fsdp"] * mesh.shape["model"])


def microbatch(
    model: vit.VisionTransformer, config: ml_collections.FrozenConfigDict, mesh: jax.sharding.Mesh
) -> int:
    """Images that a device processes at once: what the config says, or what fits; 0: no limit.

    Args:
      model: the ViT.
      config: what `train_step.step_config` gives.
      mesh: the devices; where they do not say how much memory they have, there is no limit.
    """
    if config.microbatch != AUTO:
        return config.microbatch
    memory = chips.memory(mesh.devices.flat[0])
    if memory is None:
        return 0
    left = SHARE * memory - state_bytes(model, bool(config.ema_decay), mesh)
    return max(int(left / bytes_per_image(model)), 1)
