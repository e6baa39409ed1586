"""PGQA's noise: drawn to match the statistics of what it perturbs, then subtracted.

The paper subtracts a Gaussian matrix with zero diagonal from the attention maps; the released code
subtracts uniform noise from the attention output. docs/method.md compares the two.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kdgqa_jax import options
from kdgqa_jax.errors import unknown
from kdgqa_jax.options import option

Array = jax.Array

DRAWS = {"normal": jax.random.normal, "uniform": jax.random.uniform}
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


TARGETS = {"maps": perturb_maps, "output": perturb_output}


@dataclasses.dataclass(frozen=True)
class Noise:
    """What is subtracted from what, and when.

    Attributes:
      noise_target: "maps" (the paper) or "output" (as released).
      noise_distribution: "normal" or "uniform" (as released).
      noise_statistics: what the noise matches of the row that it perturbs: "std" (its mean is
        zero, so evaluation without noise sees what training saw on average) or "mean_std" (as
        released, where evaluation is perturbed too).
      noise_scale: factor on the noise.
      noise_at_eval: perturb in evaluation too. The released code does; the default here is False,
        so that evaluation is deterministic.
    """

    noise_target: str = option("maps", choices=TARGETS)
    noise_distribution: str = option("normal", choices=DRAWS)
    noise_statistics: str = option("std", choices=STATISTICS)
    noise_scale: float = option(1.0)
    noise_at_eval: bool = option(False)

    def __post_init__(self) -> None:
        options.check(self)

    def subtract(self, rng: Array, x: Array) -> Array:
        """The target, maps BNTS or an output BTNH, less the noise."""
        perturb = TARGETS[self.noise_target]
        return perturb(rng, x, self.noise_scale, self.noise_distribution, self.noise_statistics)
