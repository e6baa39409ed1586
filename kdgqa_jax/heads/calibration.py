"""The moments of what every attention layer of a ViT sees, from calibration images.

L  layers    B  batch    T  tokens    D  model width
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import sharding, tree_utils, vit
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads.moments import InputMoments, data_free_by_layer

Array = jax.Array


def _sums(x: Array, mask: Array) -> dict[str, Array]:
    """(..., B, T, D) -> float32 mean tokens (..., B, D) and centred products (..., D, D)."""
    x = x.astype(jnp.float32)
    means = jnp.mean(x, axis=-2)
    centred = jnp.where(mask[:, None, None], x - means[..., None, :], 0.0)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    return {"means": means, "within": jnp.einsum("...BTD,...BTE->...DE", centred, centred, **exact)}


@functools.lru_cache(maxsize=4)
def make_moments_step(
    model: vit.VisionTransformer, mesh: jax.sharding.Mesh
) -> Callable[..., dict[str, Any]]:
    """A jitted (variables, batch) -> sums of one batch, by layer.

    `batch` holds "image" (B, height, width, channels), normalised, and "mask" (B,) bool. Attention
    maps are used and forgotten: none is an output of the program.
    """

    @sharding.jit_for(mesh, out_shardings=sharding.replicated(mesh))
    def moments_step(variables: dict[str, Any], batch: dict[str, Array]) -> dict[str, Any]:
        _, collections = model.apply(
            variables,
            batch["image"],
            mask=batch["mask"],
            mutable=["inputs"],
            rngs={"noise": jax.random.key(0)},  # for pgqa with noise_at_eval only
            method="features",
        )
        return {
            name: _sums(layer["attn"]["x"], batch["mask"])
            for name, layer in collections["inputs"].items()
        }

    return moments_step


def gather_moments(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    images: np.ndarray,
    *,
    batch_size: int = 8,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, InputMoments]:
    """Moments of the input of every attention layer, in one pass over some images.

    A batch is summed in float32 on the device. What is summed are products of centred tokens, so
    nothing cancels: of normalised ones, the rounding came to 3e-7 of the largest eigenvalue (D =
    1024, 6,304 tokens), where `merging` has its floor and ridge. Batches, and all that depends on
    means, are summed in float64 on the host, so that more images make nothing worse.

    Args:
      model: any variant, layers scanned or not.
      variables: {"params": ...} and, for DGQA, "norm_stats".
      images: (n, height, width, channels) float32, normalised.
      batch_size: images at a time, rounded up to a multiple of the devices; the last batch is
        padded with images that do not count.
      mesh: of the devices; None: all of them.

    Returns:
      Moments by layer name: "blocks_0", ...

    Raises:
      UserError: no images, or images of another size than the model's.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    step = make_moments_step(model, mesh)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    length = model.grid[0] * model.grid[1] + model.num_prefix_tokens
    moments: dict[str, InputMoments] = {}
    for batch in padded_batches(images, batch_size, mesh):
        tokens = np.asarray(batch["mask"]) * length
        _add(moments, tokens, jax.device_get(step(variables, batch)))
    return moments


def _add(moments: dict[str, InputMoments], tokens: np.ndarray, sums: dict[str, Any]) -> None:
    """Add the sums of a batch, which are forgotten before the next one."""
    for name, layer in tree_utils.unstack_layers(sums).items():
        kept = moments.setdefault(name, InputMoments.empty(len(layer["within"])))
        kept.add_images(tokens, layer["means"], layer["within"])


def padded_batches(
    images: np.ndarray, batch_size: int, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, Array]]:
    """Batches of one size: "image", split over the mesh, and "mask" (B,) bool, False for padding.

    Raises UserError: no images, or an array of another rank than NHWC.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or not len(images):
        raise UserError(
            f"calibration images must be (n, height, width, channels), got shape {images.shape}"
        )
    devices = sharding.batch_devices(mesh)
    batch_size = -(-min(batch_size, len(images)) // devices) * devices
    for start in range(0, len(images), batch_size):
        chunk = images[start : start + batch_size]
        padding = np.zeros((batch_size - len(chunk), *chunk.shape[1:]), np.float32)
        batch = {
            "image": np.concatenate([chunk, padding]),
            "mask": np.arange(batch_size) < len(chunk),
        }
        yield sharding.put_batch(batch, mesh)


def layer_moments(
    model: vit.VisionTransformer, variables: dict[str, Any], images: np.ndarray | None
) -> dict[str, InputMoments]:
    """Moments of the input of every attention layer by name: of images, or without data.

    Arguments and errors are those of `gather_moments`.

    Raises:
      UserError: there are no images, and nothing normalises what attention sees.
    """
    if images is not None:
        return gather_moments(model, variables, images)
    if model.block.block == "post_norm":
        raise UserError(
            "blocks of post_norm do not normalise what attention sees, so that norms say nothing"
            " about it; give calibration images (--calibration), or pool the heads (--pooling mean)"
        )
    return data_free_by_layer(tree_utils.unstack_layers(variables["params"]))
