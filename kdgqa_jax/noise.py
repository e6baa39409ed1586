"""PGQA's noise: drawn to match the statistics of what it perturbs, then subtracted.

The paper subtracts a Gaussian matrix with zero diagonal from the attention maps; the released code
subtracts uniform noise from the attention output. docs/method.md compares the two.
"""

import jax
import jax.numpy as jnp

from kdgqa_jax.errors import unknown

Array = jax.Array

DRAWS = {"normal": jax.random.normal, "uniform": jax.random.uniform}
TARGETS = ("maps", "output")


def matched_noise(rng: Array, target: Array, distribution: str = "normal") -> Array:
    """Noise with the mean and the standard deviation of each row (last axis) of `target`.

    One draw is shared by the whole batch (axis 0), so that an image's noise does not depend on its
    place in the batch; the draw is standardised per row before it takes on the row's statistics.
    The noise carries no gradient.

    Args:
      rng: key.
      target: float array, batch axis first.
      distribution: "normal" or "uniform".

    Returns:
      float32, the shape of `target`.
    """
    if distribution not in DRAWS:
        raise unknown("noise_distribution", distribution, DRAWS)
    draw = DRAWS[distribution](rng, target.shape[1:], jnp.float32)
    draw = jax.nn.standardize(draw, axis=-1)
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    mean, std = (f(target, axis=-1, keepdims=True) for f in (jnp.mean, jnp.std))
    return mean + std * draw


def perturb_maps(rng: Array, maps: Array, scale: float, distribution: str) -> Array:
    """Subtract matched noise with zero diagonal from attention maps BNTS (the paper's PGQA)."""
    off_diagonal = ~jnp.eye(*maps.shape[-2:], dtype=bool)
    return maps - scale * matched_noise(rng, maps, distribution) * off_diagonal


def perturb_output(rng: Array, out: Array, scale: float, distribution: str) -> Array:
    """Subtract matched noise from an attention output BTNH, as the released code does.

    The first entry (h = 0) of every row stays as it is.
    """
    noise = matched_noise(rng, out, distribution).at[..., 0].set(0.0)
    return out - (scale * noise).astype(out.dtype)
