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
