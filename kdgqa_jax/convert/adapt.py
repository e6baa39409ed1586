"""Fitting parameters to another image size or another number of image channels, as timm does it."""

import jax
import numpy as np

from kdgqa_jax.errors import UserError


def resize_pos_embed(
    pos_embed: np.ndarray,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    num_prefix_tokens: int,
) -> np.ndarray:
    """A position embedding for another grid of patches.

    Bicubic with antialiasing, which is how timm calls torch's `interpolate`; the entries of the
    class and distillation tokens stay.

    Args:
      pos_embed: (1, num_prefix_tokens + rows * columns, D) float32.
      old_grid: (rows, columns) of `pos_embed`.
      new_grid: (rows, columns) wanted.
      num_prefix_tokens: entries before those of the patches.

    Returns:
      (1, num_prefix_tokens + new rows * new columns, D) float32.
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    prefix, patches = np.split(np.asarray(pos_embed), [num_prefix_tokens], axis=1)
    width = pos_embed.shape[-1]
    patches = jax.image.resize(
        patches.reshape(*old_grid, width), (*new_grid, width), "cubic", antialias=True
    )
    return np.concatenate([prefix, np.asarray(patches).reshape(1, -1, width)], axis=1)


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
