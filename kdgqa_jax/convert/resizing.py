"""Fitting parameters to another image size or another number of image channels."""

from collections.abc import Callable

import jax
import numpy as np

from kdgqa_jax.errors import UserError

# --- position embeddings ------------------------------------------------------------------------


def _antialiased(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """torch's interpolate(mode="bicubic", antialias=True)."""
    return np.asarray(
        jax.image.resize(patches, (*grid, patches.shape[-1]), "cubic", antialias=True)
    )


def _bicubic(patches: np.ndarray, grid: tuple[int, int], offset: float = 0.0) -> np.ndarray:
    """torch's interpolate(mode="bicubic"); with an offset, scales by (new + offset) / old."""
    rows, columns = (
        _bicubic_weights(old, new, offset) for old, new in zip(patches.shape[:2], grid, strict=True)
    )
    out = np.einsum("ij,kl,jld->ikd", rows, columns, patches.astype(np.float64), optimize=True)
    return out.astype(patches.dtype)


def _bicubic_weights(old: int, new: int, offset: float) -> np.ndarray:
    """(new, old) weights of cubic convolution with a = -0.75, edges repeated, no antialiasing."""
    places = (np.arange(new) + 0.5) * (old / (new + offset)) - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(places - (first + tap))
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        columns = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), columns), np.where(distance <= 1, near, far))
    return weights


RESIZING: dict[str, tuple[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]]] = {
    "timm": ("bicubic, antialiased", _antialiased),
    "torch_bicubic": ("bicubic, not antialiased", _bicubic),
    "dinov2": ("bicubic, not antialiased, offset 0.1", lambda x, grid: _bicubic(x, grid, 0.1)),
}
"""By name: (what reports call it, (rows, columns, D) and a new grid -> (new rows, new columns, D)).

timm, OpenCLIP and models with registers antialias; transformers does not; the authors of DINOv2 add
0.1 to the new size. `sources` says which framework does which.
"""


def resize_pos_embed(
    pos_embed: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
    resizing: str = "timm",
) -> np.ndarray:
    """A position embedding for another grid of patches; entries of other tokens stay.

    Args:
      pos_embed: (1, num_prefix_tokens + rows * columns, D) float32.
      old_grid: (rows, columns) of `pos_embed`.
      new_grid: (rows, columns) wanted.
      num_prefix_tokens: entries before those of the patches.
      resizing: a name in `RESIZING`.

    Returns:
      (1, num_prefix_tokens + new rows * new columns, D) float32.
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, patches = np.split(np.asarray(pos_embed), [num_prefix_tokens], axis=1)
    width = pos_embed.shape[-1]
    _, resize = RESIZING[resizing]
    patches = resize(patches.reshape(*old_grid, width), tuple(new_grid))
    return np.concatenate([prefix, patches.reshape(1, -1, width)], axis=1)


# --- channels -----------------------------------------------------------------------------------


def adapt_input_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A patch embedding kernel (P, P, 3, D) for images with another number of channels.

    One channel: the sum over the three, so that a grey image gives what it gave as RGB. More: the
    three repeated in turns and scaled by 3/channels.

    Raises UserError: the kernel is not one for three channels.
    """
    have = kernel.shape[2]
    if channels == have:
        return kernel
    if have != 3 or channels < 1:
        raise UserError(
            f"a patch embedding for {have} channels cannot be fitted to {channels}: only one for 3"
            " channels can"
        )
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.take(kernel, np.arange(channels) % 3, axis=2)
    return repeated * np.float32(3 / channels)


def grey_patch_embedding(
    kernel: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """A patch embedding for grey images that gives what it gave for them as colour images.

    Args:
      kernel: (P, P, C, D), for images of which each channel is normalised by its own numbers.
      bias: (D,).
      mean: (C,) of pixel values in 0..1.
      std: (C,) of pixel values in 0..1.

    Returns:
      kernel (P, P, 1, D) and bias (D,) for images normalised by one mean and one std, and these two
      numbers: the averages. A grey value g gave sum_c W_c (g - m_c) / s_c, which is
      W' (g - m) / s + b' with W' = s sum_c W_c / s_c and b' = sum_c W_c (m - m_c) / s_c.
    """
    mean, std, kernel64 = (np.asarray(x, np.float64) for x in (mean, std, kernel))
    one_mean, one_std = float(mean.mean()), float(std.mean())
    by_channel = kernel64 / std[:, None]  # P, P, C, D
    shift = np.einsum("PQCD,C->D", by_channel, one_mean - mean)
    grey = one_std * by_channel.sum(axis=2, keepdims=True)
    return grey.astype(kernel.dtype), (bias + shift).astype(bias.dtype), one_mean, one_std
