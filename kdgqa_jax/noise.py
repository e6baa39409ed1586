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
STATISTICS = ("std", "mean_std")


def matched_noise(
    rng: Array, target: Array, distribution: str = "normal", statistics: str = "std"
) -> Array:
    """Noise with the standard deviation, or mean too, of each row (last axis) of `target`.

    One draw is shared by the whole batch (axis 0), so that an image's noise does not depend on its
    place in the batch; the draw is standardised per row before it takes on the row's statistics.
    The noise carries no gradient.

    Args:
      rng: key.
      target: float array, batch axis first.
      distribution: "normal" or "uniform".
      statistics: what of the row the noise matches: "std" (mean zero) or "mean_std".

    Returns:
      float32, the shape of `target`.

    Raises:
      UserError: an unknown distribution or statistics.
    """
    if distribution not in DRAWS:
        raise unknown("noise_distribution", distribution, DRAWS)
    if statistics not in STATISTICS:
        raise unknown("noise_statistics", statistics, STATISTICS)
    draw = DRAWS[distribution](rng, target.shape[1:], jnp.float32)
    draw = jax.nn.standardize(draw, axis=-1)[None]
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    noise = jnp.std(target, axis=-1, keepdims=True) * draw
    if statistics == "mean_std":
        noise += jnp.mean(target, axis=-1, keepdims=True)
    return noise


def perturb_maps(rng: Array, maps: Array, scale: float, *matching: str) -> Array:
    """Subtract matched noise with zero diagonal from attention maps BNTS (the paper's PGQA).

    `matching`: distribution and statistics, as `matched_noise` takes them.
    """
    diagonal = jnp.eye(*maps.shape[-2:], dtype=bool)[None, None]
    return maps - jnp.where(diagonal, 0.0, scale * matched_noise(rng, maps, *matching))


def perturb_output(rng: Array, out: Array, scale: float, *matching: str) -> Array:
    """Subtract matched noise from an attention output BTNH, as the released code does.

    The first entry (h = 0) of every row stays as it is.
    """
    noise = matched_noise(rng, out, *matching).at[..., 0].set(0.0)
    return out - (scale * noise).astype(out.dtype)
