"""What happens to images on the device, inside the jitted step."""

import jax
import jax.numpy as jnp


def to_model_input(
    images: jax.Array, image_shape: tuple[int, int], mean: float, std: float
) -> jax.Array:
    """uint8 (B, H, W, C) -> float32 (B, *image_shape, C): bilinear resize, then normalisation.

    `mean` and `std` are those of pixel values in 0..1.
    """
    images = images.astype(jnp.float32) / 255.0
    if images.shape[1:3] != image_shape:
        shape = (images.shape[0], *image_shape, images.shape[3])
        images = jax.image.resize(images, shape, "bilinear")
    return (images - mean) / std
