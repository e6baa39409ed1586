"""RandAugment on the device: torchvision's fourteen operations on PIL images, for whole batches.

Every operation is one of three kinds of work, so a batch in which each image has its own operation
takes one pass of each kind, with parameters that leave the other images as they are:

    affine  a nearest neighbour gather, black outside
    blend   degenerate + factor * (image - degenerate)
    lut     a lookup table of 256 grey levels per channel, made from the image's histogram

Axis legend: B batch, H height, W width, C channels (1 or 3). A *magnitude* has the unit of its
operation (shear, pixels, degrees, factor - 1, bits, grey level) and carries the random sign.

Source: "RandAugment: Practical automated data augmentation with a reduced search space",
arXiv 1909.13719; operations, magnitudes and sampling are those of torchvision, pixels those of PIL.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax.errors import UserError

Array = jax.Array


# --- affine: what to add to a pixel's position to find its source, (B, 2, 3) float32 --------------
#
# Rows are x and y. Columns are the change per pixel to the right, the change per pixel down, and
# the displacement of the top left pixel's centre, in pixels.


def _displacement(*entries: Array | float) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*entries), axis=-1).reshape(-1, 2, 3)


def _shear_x(m: Array, height: int, width: int) -> Array:
    return _displacement(0.0, m, m / 2, 0.0, 0.0, 0.0)


def _shear_y(m: Array, height: int, width: int) -> Array:
    return _displacement(0.0, 0.0, 0.0, m, 0.0, m / 2)


def _translate_x(m: Array, height: int, width: int) -> Array:
    return _displacement(0.0, 0.0, -jnp.trunc(m), 0.0, 0.0, 0.0)


def _translate_y(m: Array, height: int, width: int) -> Array:
    return _displacement(0.0, 0.0, 0.0, 0.0, 0.0, -jnp.trunc(m))


def _rotate(m: Array, height: int, width: int) -> Array:
    angle = jnp.deg2rad(m)
    sin, cos_minus_1 = jnp.sin(angle), -2 * jnp.square(jnp.sin(angle / 2))
    x, y = (1 - width) / 2, (1 - height) / 2  # the top left pixel, seen from the image's centre
    return _displacement(
        cos_minus_1, -sin, cos_minus_1 * x - sin * y, sin, cos_minus_1, sin * x + cos_minus_1 * y
    )


def _gather(images: Array, displacement: Array) -> Array:
    """The source pixel of each pixel, in PIL's fixed point numbers of 1/65536 pixel."""
    batch, height, width, channels = images.shape
    scaled = displacement * 65536
    floor = jnp.floor(scaled)
    fixed = (floor + (scaled - floor >= 0.5).astype(floor.dtype)).astype(jnp.int32)
    fixed = fixed[..., None, None]  # (B, 2, 3, 1, 1)
    y, x = jnp.indices((height, width), dtype=jnp.int32, sparse=True)
    y, x = y[None, None], x[None, None]  # (1, 1, H, 1), (1, 1, 1, W)
    moved = fixed[:, :, 0] * x + fixed[:, :, 1] * y + fixed[:, :, 2] + 32768  # (B, 2, H, W)
    source_x, source_y = x[0] + (moved[:, 0] >> 16), y[0] + (moved[:, 1] >> 16)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = jnp.where(inside, source_y * width + source_x, 0).reshape(batch, -1, 1)
    pixels = images.reshape(batch, -1, channels)
    gathered = jnp.take_along_axis(pixels, index, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], gathered.reshape(images.shape), 0)


# --- blend: the degenerate image of an image, (B, H, W, C) int32 ---------------------------------


def _black(images: Array) -> Array:
    return jnp.zeros_like(images)


def _grey(images: Array) -> Array:
    """ITU-R 601-2 luma in 16 bit fixed point, (B, H, W, 1) if there are three channels."""
    if images.shape[-1] == 1:
        return images
    weighted = images * jnp.array([19595, 38470, 7471])
    return (jnp.sum(weighted, axis=-1, keepdims=True) + 0x8000) >> 16


def _mean_grey(images: Array) -> Array:
    count = images.shape[1] * images.shape[2]
    total = jnp.sum(_grey(images), axis=(1, 2, 3), keepdims=True, dtype=jnp.uint32)
    return ((2 * total + count) // (2 * count)).astype(jnp.int32)


def _smooth(images: Array) -> Array:
    """The mean over 3x3 pixels, the middle one counted five times; the border stays as it is."""
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    boxes = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * images[:, 1:-1, 1:-1]
    return images.at[:, 1:-1, 1:-1].set((2 * boxes + 13) // 26)


def _blend(images: Array, degenerate: Array, factor: Array) -> Array:
    """`images` and `degenerate` int32, `factor` (B, 1, 1, 1) float32 -> uint8."""
    # Clipping where it changes nothing keeps product and sum, each rounded as in PIL, from fusing.
    change = jnp.clip(factor * (images - degenerate).astype(jnp.float32), -512, 512)
    return jnp.clip(degenerate.astype(jnp.float32) + change, 0, 255).astype(jnp.uint8)


# --- lut: the new value of each grey level, (B, 256, C) or (B, 256, 1) int32 ---------------------

_LEVELS = np.arange(256, dtype=np.int32)[None, :, None]


def _posterize(histogram: Array, m: Array) -> Array:
    dropped = 8 - m.astype(jnp.int32)[:, None, None]
    return _LEVELS >> dropped << dropped


def _solarize(histogram: Array, m: Array) -> Array:
    return jnp.where(m[:, None, None] > _LEVELS.astype(m.dtype), _LEVELS, 255 - _LEVELS)


@functools.cache
def _autocontrast_shortfall() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where PIL's `int(level * scale - low * scale)` in float64 is 1 below the exact quotient.

    With `spread = high - low` that can only be where (level - low) * 255 / spread is whole, every
    `stride[spread]` levels from `low`. Returns (stride (256,), start (256,), short): the entry for
    the i-th such level is `short[start[spread] + low * (spread // stride[spread] + 1) + i]`.
    """
    spreads = np.arange(1, 256)
    strides = spreads // np.gcd(spreads, 255)
    short = []
    for spread, stride in zip(spreads, strides, strict=True):
        scale = 255.0 / spread
        low, above = np.arange(256 - spread)[:, None], np.arange(0, spread + 1, stride)
        stretched = ((low + above) * scale - low * scale).astype(np.int64)
        short.append((stretched < above * 255 // spread).ravel())
    starts = np.cumsum([0, *map(len, short)])[:-1]
    stride, start = (np.pad(x, (1, 0), constant_values=1) for x in (strides, starts))
    return stride.astype(np.int32), start.astype(np.int32), np.concatenate(short)


def _autocontrast(histogram: Array, m: Array) -> Array:
    present = histogram > 0
    low = jnp.argmax(present, axis=1, keepdims=True)
    high = 255 - jnp.argmax(present[:, ::-1], axis=1, keepdims=True)
    spread = high - low
    above = jnp.clip(_LEVELS - low, 0, spread)
    stride, start, short = map(jnp.asarray, _autocontrast_shortfall())
    stride, start = stride[spread], start[spread]
    entry = start + low * (spread // stride + 1) + above // stride
    below_exact = (short[entry] & (above % stride == 0)).astype(jnp.int32)
    stretched = above * 255 // jnp.maximum(spread, 1) - below_exact
    return jnp.where(spread > 0, stretched, _LEVELS)


def _equalize(histogram: Array, m: Array) -> Array:
    below = jnp.cumsum(histogram, axis=1) - histogram
    brightest = 255 - jnp.argmax(histogram[:, ::-1] > 0, axis=1, keepdims=True)
    step = jnp.take_along_axis(below, brightest, axis=1) // 255
    equalized = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, equalized, _LEVELS)


def _histogram(images: Array) -> Array:
    """(B, H, W, C) integers -> (B, 256, C) int32 counts."""
    batch, _, _, channels = images.shape
    b, c = jnp.indices((batch, channels), sparse=True)
    counts = jnp.zeros((batch, 256, channels), jnp.int32)
    return counts.at[b[:, None, None], images, c[:, None, None]].add(1, mode="promise_in_bounds")


def _look_up(images: Array, lut: Array) -> Array:
    batch, _, _, channels = images.shape
    levels = images.reshape(batch, -1, channels)
    found = jnp.take_along_axis(lut, levels, axis=1, mode="promise_in_bounds")
    return found.reshape(images.shape)


# --- the operations ------------------------------------------------------------------------------

Magnitudes = Callable[[int, int, int], np.ndarray]


def _linspace(start: float, stop: float, num_bins: int) -> np.ndarray:
    """(num_bins,) float32, rounded once from either end to the middle, as torch.linspace does."""
    start, stop = np.float32(start), np.float32(stop)
    step, index = np.float64((stop - start) / np.float32(num_bins - 1)), np.arange(num_bins)
    values = np.where(index < num_bins // 2, start + step * index, stop - step * index[::-1])
    return values.astype(np.float32)


def _between(start: float, stop: float) -> Magnitudes:
    return lambda num_bins, height, width: _linspace(start, stop, num_bins)


def _shift_x(num_bins: int, height: int, width: int) -> np.ndarray:
    return _linspace(0.0, 150.0 / 331.0 * width, num_bins)


def _shift_y(num_bins: int, height: int, width: int) -> np.ndarray:
    return _linspace(0.0, 150.0 / 331.0 * height, num_bins)


def _bits(num_bins: int, height: int, width: int) -> np.ndarray:
    index = np.arange(num_bins, dtype=np.float32)
    return 8 - np.round(index / np.float32((num_bins - 1) / 4))


class Op(NamedTuple):
    """An operation: what kind of work it is, its own part of it, and its magnitudes.

    `function` of the family "affine" is (magnitude (B,), H, W) -> displacement; of "blend" images
    -> degenerate images; of "lut" (histogram, magnitude (B,)) -> lut; see the sections above.
    `magnitudes` is (num_bins, H, W) -> (num_bins,) float32, and `signed` says whether a random one
    of them is negated.
    """

    family: str
    function: Callable[..., Array] | None
    magnitudes: Magnitudes
    signed: bool


OPS: dict[str, Op] = {
    "Identity": Op("none", None, _between(0.0, 0.0), False),
    "ShearX": Op("affine", _shear_x, _between(0.0, 0.3), True),
    "ShearY": Op("affine", _shear_y, _between(0.0, 0.3), True),
    "TranslateX": Op("affine", _translate_x, _shift_x, True),
    "TranslateY": Op("affine", _translate_y, _shift_y, True),
    "Rotate": Op("affine", _rotate, _between(0.0, 30.0), True),
    "Brightness": Op("blend", _black, _between(0.0, 0.9), True),
    "Color": Op("blend", _grey, _between(0.0, 0.9), True),
    "Contrast": Op("blend", _mean_grey, _between(0.0, 0.9), True),
    "Sharpness": Op("blend", _smooth, _between(0.0, 0.9), True),
    "Posterize": Op("lut", _posterize, _bits, False),
    "Solarize": Op("lut", _solarize, _between(255.0, 0.0), False),
    "AutoContrast": Op("lut", _autocontrast, _between(0.0, 0.0), False),
    "Equalize": Op("lut", _equalize, _between(0.0, 0.0), False),
}
"""The operations by name, in torchvision's order; `op_index` counts in it."""


def _choose(family: str, op_index: Array, default: Array, *arguments: object) -> Array:
    """What each image's operation gives, called with `arguments`; `default` for other families."""
    for index, op in enumerate(OPS.values()):
        if op.family == family:
            chosen = jnp.expand_dims(op_index == index, range(1, default.ndim))
            default = jnp.where(chosen, op.function(*arguments), default)
    return default


@jax.jit
def apply_op(images: Array, op_index: Array, signed_magnitude: Array) -> Array:
    """Apply to each image its own operation.

    Args:
      images: (B, H, W, C) uint8, C 1 or 3.
      op_index: (B,) integers, positions in `OPS`.
      signed_magnitude: (B,) float32, in the unit of the operation; ignored where it has none.

    Returns:
      (B, H, W, C) uint8.

    Raises:
      UserError: `images` are not as above.
    """
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != jnp.uint8:
        raise UserError(
            "RandAugment needs uint8 images of shape (B, H, W, 1) or (B, H, W, 3), got"
            f" {images.dtype} {images.shape}"
        )
    batch, height, width, channels = images.shape
    magnitude = signed_magnitude.astype(jnp.float32)
    levels = images.astype(jnp.int32)
    degenerate = _choose("blend", op_index, levels, levels)
    blended = _blend(levels, degenerate, 1.0 + magnitude[:, None, None, None])

    same = jnp.broadcast_to(_LEVELS, (batch, 256, channels))
    # Under a condition: a compiler makes the tables for each pixel anew if it can.
    lut = jax.lax.cond(
        jnp.any(jnp.asarray([op.family == "lut" for op in OPS.values()])[op_index]),
        lambda: _choose("lut", op_index, same, _histogram(levels), magnitude).astype(jnp.uint8),
        lambda: same.astype(jnp.uint8),
    )
    still = jnp.zeros((batch, 2, 3), jnp.float32)
    displacement = _choose("affine", op_index, still, magnitude, height, width)
    return _gather(_look_up(blended, lut), displacement)


def sample_ops(keys: Array, num_ops: int) -> tuple[Array, Array]:
    """Draw the operations of each image: each of `OPS` as likely as the others, either sign too.

    Args:
      keys: (B,) typed PRNG keys.
      num_ops: how many operations each image gets.

    Returns:
      (op_index (B, num_ops) int32, sign (B, num_ops) float32 of -1 and 1). The sign counts for
      signed operations only.
    """

    def sample(key: Array) -> tuple[Array, Array]:
        op_key, sign_key = jax.random.split(key)
        op_index = jax.random.randint(op_key, (num_ops,), 0, len(OPS))
        return op_index, jax.random.rademacher(sign_key, (num_ops,), jnp.float32)

    return jax.vmap(sample)(keys)


def _check_options(images: Array, keys: Array, num_ops: int, magnitude: int, bins: int) -> None:
    if not isinstance(num_ops, int) or num_ops < 0:
        raise UserError(f"num_ops={num_ops} must be an integer that is not negative")
    if not isinstance(bins, int) or bins < 2:
        raise UserError(f"num_magnitude_bins={bins} must be an integer of at least 2")
    if not isinstance(magnitude, int) or not 0 <= magnitude < bins:
        raise UserError(
            f"magnitude={magnitude} must be an integer in 0..{bins - 1}, below num_magnitude_bins"
        )
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != images.shape[:1]:
        raise UserError(
            f"RandAugment needs one typed key (jax.random.key) per image, {images.shape[:1]}, got"
            f" {keys.dtype} {keys.shape}"
        )


@functools.partial(jax.jit, static_argnames=("num_ops", "magnitude", "num_magnitude_bins"))
def rand_augment(
    images: Array,
    keys: Array,
    num_ops: int = 2,
    magnitude: int = 9,
    num_magnitude_bins: int = 31,
) -> Array:
    """Apply `num_ops` random operations to each image, one after the other.

    Args:
      images: (B, H, W, C) uint8, C 1 or 3.
      keys: (B,) typed PRNG keys, of the default threefry: what becomes of an image then depends on
        its own key alone.
      num_ops: how many operations each image gets; 0 leaves the images as they are.
      magnitude: strength of the operations, 0..num_magnitude_bins-1.
      num_magnitude_bins: into how many steps the range of magnitudes is divided, at least 2.

    Returns:
      (B, H, W, C) uint8.

    Raises:
      UserError: an option is out of its range, or `images` or `keys` are not as above.
    """
    _check_options(images, keys, num_ops, magnitude, num_magnitude_bins)
    _, height, width, _ = images.shape
    tables = [op.magnitudes(num_magnitude_bins, height, width) for op in OPS.values()]
    strength = jnp.asarray([table[magnitude] for table in tables], jnp.float32)
    signed = jnp.asarray([op.signed for op in OPS.values()])
    op_index, sign = sample_ops(keys, num_ops)
    signed_magnitude = strength[op_index] * jnp.where(signed[op_index], sign, 1.0)

    def step(images: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        return apply_op(images, *drawn), None

    return jax.lax.scan(step, images, (op_index.T, signed_magnitude.T))[0]
