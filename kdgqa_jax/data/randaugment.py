"""RandAugment on the device: torchvision's fourteen operations on PIL images, for whole batches.

Every operation is one of three kinds of work:

    pixel     the new level of a pixel follows from its own channels: computed for the whole batch
    image     it follows from the whole image, by its histogram, mean or neighbours: computed for
              the images that have such an operation, a few at a time (`pixels.on_chosen`)
    x, y, xy  the nearest source pixel, found along these axes, black outside: all images at once

How pixels are counted, looked up and moved depends on the hardware; see `pixels.py`.

Axis legend: B batch, C channels (1 or 3), H height, W width. Inside, images are planes, BCHW, and
`levels` are planes as int32. A *magnitude* has the unit of its operation (shear, pixels, degrees,
factor - 1, bits, grey level) and carries the random sign.

Source: "RandAugment: Practical automated data augmentation with a reduced search space",
arXiv 1909.13719; operations, magnitudes and sampling are those of torchvision, pixels those of PIL.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import sharding
from kdgqa_jax.data import pixels
from kdgqa_jax.errors import UserError

Array = jax.Array


# --- x, y, xy: `pixels.Moves.displacement` of each magnitude, (B, 2, 3) float32 -------------------


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


# --- pixel: the new levels of (B, C, H, W) int32 ones, by magnitudes (B, 1, 1, 1) -----------------


def _blend(levels: Array, degenerate: Array, factor: Array) -> Array:
    """`levels` and `degenerate` int32, `factor` (B, 1, 1, 1) float32 -> int32."""
    # Clipping where it changes nothing keeps product and sum, each rounded as in PIL, from fusing.
    change = jnp.clip(factor * (levels - degenerate).astype(jnp.float32), -512, 512)
    return jnp.clip(degenerate.astype(jnp.float32) + change, 0, 255).astype(jnp.int32)


def _brightness(levels: Array, m: Array) -> Array:
    return _blend(levels, jnp.zeros_like(levels), 1.0 + m)


def _grey(levels: Array) -> Array:
    """ITU-R 601-2 luma in 16 bit fixed point, (B, 1, H, W)."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = (levels[:, c : c + 1] for c in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _color(levels: Array, m: Array) -> Array:
    return _blend(levels, _grey(levels), 1.0 + m)


def _posterize(levels: Array, m: Array) -> Array:
    dropped = 8 - m.astype(jnp.int32)
    return levels >> dropped << dropped


def _solarize(levels: Array, m: Array) -> Array:
    return jnp.where(m > levels.astype(m.dtype), levels, 255 - levels)


# --- image: the new planes of (B, C, H, W) uint8 ones, by magnitudes (B,) -------------------------


def _contrast(planes: Array, m: Array) -> Array:
    levels = planes.astype(jnp.int32)
    count = levels.shape[2] * levels.shape[3]
    total = jnp.sum(_grey(levels), axis=(1, 2, 3), keepdims=True, dtype=jnp.uint32)
    mean = ((2 * total + count) // (2 * count)).astype(jnp.int32)
    return _blend(levels, mean, 1.0 + m[:, None, None, None]).astype(jnp.uint8)


def _sharpness(planes: Array, m: Array) -> Array:
    """By the mean over 3x3 pixels, the middle one counted five times; the border stays as it is."""
    levels = planes.astype(jnp.int32)
    inner = np.zeros((1, 1, *levels.shape[2:]), bool)
    inner[:, :, 1:-1, 1:-1] = True
    smooth = (2 * pixels.form().boxes(planes) + 13) * 10083 >> 18  # exactly // 26
    degenerate = jnp.where(inner, smooth, levels)
    return _blend(levels, degenerate, 1.0 + m[:, None, None, None]).astype(jnp.uint8)


def _by_table(lut: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """The operation of a table; `lut` is histogram -> new values of levels, (B, C, 256) int32."""

    def look_up(planes: Array, m: Array) -> Array:
        form = pixels.form()
        table = lut(form.histogram(planes)).astype(jnp.uint8)
        # Behind a barrier, lest the compiler make the table again for each pixel.
        return form.look_up(planes, jax.lax.optimization_barrier(table)).astype(jnp.uint8)

    return look_up


_LEVELS = np.arange(pixels.LEVELS, dtype=np.int32)[None, None]


@functools.cache
def _scales() -> np.ndarray:
    """(3, 256) int32: what the float64 `255.0 / spread` of PIL is, by spread.

    Its exponent, the last nine bits of its significand, and how much that is too large, in
    1 / spread of the last bit.
    """
    spread = np.arange(1, 256)
    significand, exponent = np.frexp(255.0 / spread)
    bits, exponent = (significand * 2.0**53).astype(np.int64), exponent - 1
    excess = bits * spread - (255 << (52 - exponent))
    return np.pad([exponent, bits % 512, excess], ((0, 0), (1, 0))).astype(np.int32)


def _log2(number: Array) -> Array:
    """Rounded down; -1 for numbers below 1."""
    return 31 - jax.lax.clz(jnp.maximum(number, 0))


def _rounding(level: Array, spread: Array, exponent: Array, bits: Array) -> Array:
    """What float64 adds to `level * (255.0 / spread)` as it rounds, in last bits of the scale."""
    dropped = jnp.maximum(_log2(level * 255 // spread) - exponent, 0)
    product, unit = level * bits, 1 << dropped
    rest, odd = product & (unit - 1), (product >> dropped) & 1
    return jnp.where(2 * rest + odd > unit, unit, 0) - rest  # halves go to the even one


def _autocontrast(histogram: Array) -> Array:
    """PIL's `int(level * scale - low * scale)` in float64: 1 below some whole quotients."""
    present = histogram > 0
    low = jnp.argmax(present, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(present[..., ::-1], axis=-1, keepdims=True)
    spread = jnp.maximum(high - low, 1)
    exponent, bits, excess = (pixels.pick(table, high - low) for table in _scales())
    above = jnp.clip(_LEVELS - low, 0, spread)
    quotient, rest = above * 255 // spread, above * 255 % spread
    added = _rounding(low + above, spread, exponent, bits) - _rounding(low, spread, exponent, bits)
    error = above * excess // spread + added
    gap = 1 << jnp.maximum(_log2(quotient - 1) - exponent, 0)  # to the number below the quotient
    stretched = quotient - ((rest == 0) & (2 * error < -gap)).astype(jnp.int32)
    return jnp.where(high > low, stretched, _LEVELS)


def _equalize(histogram: Array) -> Array:
    below = jnp.cumsum(histogram, axis=-1) - histogram
    step = jnp.max(jnp.where(histogram > 0, below, 0), axis=-1, keepdims=True) // 255
    equalized = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, equalized, _LEVELS)


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

    `function` of the families "x", "y" and "xy" is (magnitude (B,), H, W) -> displacement; for the
    others see the sections above.
    `magnitudes` is (num_bins, H, W) -> (num_bins,) float32, and `signed` says whether a random one
    of them is negated.
    """

    family: str
    function: Callable[..., Array] | None
    magnitudes: Magnitudes
    signed: bool


OPS: dict[str, Op] = {
    "Identity": Op("none", None, _between(0.0, 0.0), False),
    "ShearX": Op("x", _shear_x, _between(0.0, 0.3), True),
    "ShearY": Op("y", _shear_y, _between(0.0, 0.3), True),
    "TranslateX": Op("x", _translate_x, _shift_x, True),
    "TranslateY": Op("y", _translate_y, _shift_y, True),
    "Rotate": Op("xy", _rotate, _between(0.0, 30.0), True),
    "Brightness": Op("pixel", _brightness, _between(0.0, 0.9), True),
    "Color": Op("pixel", _color, _between(0.0, 0.9), True),
    "Contrast": Op("image", _contrast, _between(0.0, 0.9), True),
    "Sharpness": Op("image", _sharpness, _between(0.0, 0.9), True),
    "Posterize": Op("pixel", _posterize, _bits, False),
    "Solarize": Op("pixel", _solarize, _between(255.0, 0.0), False),
    "AutoContrast": Op("image", _by_table(_autocontrast), _between(0.0, 0.0), False),
    "Equalize": Op("image", _by_table(_equalize), _between(0.0, 0.0), False),
}
"""The operations by name, in torchvision's order; `op_index` counts in it."""


def _choose(family: str, op_index: Array, default: Array, *arguments: object) -> Array:
    """What each image's operation gives, called with `arguments`; `default` for other families."""
    for index, op in enumerate(OPS.values()):
        if op.family == family:
            chosen = jnp.expand_dims(op_index == index, range(1, default.ndim))
            default = jnp.where(chosen, op.function(*arguments), default)
    return default


class _Move(NamedTuple):
    """Some of the operations that move pixels, done together.

    Attributes:
      families: of the operations.
      group: how many images are moved at once.
      move: made by `pixels.Form.mover`.
      kind: (op_index, magnitude) of the images of a batch -> their kinds, for `move`.
    """

    families: tuple[str, ...]
    group: int
    move: Callable[[Array, Array], Array]
    kind: Callable[[Array, Array], Array]


def _apply(planes: Array, op_index: Array, magnitude: Array, moves: Sequence[_Move]) -> Array:
    """Apply to each image its own operation: (B, C, H, W) uint8 -> the same."""

    def change_pixels(planes: Array, op_index: Array, magnitude: Array) -> Array:
        levels = planes.astype(jnp.int32)
        levels = _choose("pixel", op_index, levels, levels, magnitude[:, None, None, None])
        return levels.astype(jnp.uint8)

    def is_in(*families: str) -> Array:
        members = np.asarray([op.family in families for op in OPS.values()], np.int32)
        return pixels.pick(members, op_index) > 0

    # Groups are as large as a batch of 64 images needs them, as a rule: see docs/speed.md.
    planes = pixels.on_chosen(change_pixels, is_in("pixel"), planes, op_index, magnitude, group=8)
    for index, op in enumerate(OPS.values()):
        if op.family == "image":
            chosen = op_index == index
            planes = pixels.on_chosen(op.function, chosen, planes, magnitude, group=8)
    for families, group, move, kind in moves:
        kinds = kind(op_index, magnitude)
        planes = pixels.on_chosen(move, is_in(*families), planes, kinds, group=group)
    return planes


def _move(
    families: tuple[str, ...], group: int, strength: np.ndarray, shape: tuple[int, int]
) -> _Move:
    """The operations of `families`, of magnitudes `strength` in either sign, on images (H, W)."""
    displacement, axes, first = [], [], np.zeros(len(OPS), np.int32)
    for index, op in enumerate(OPS.values()):
        if op.family in families:
            first[index] = len(axes)
            both = jnp.asarray([strength[index], -strength[index]])
            displacement.append(op.function(both, *shape))
            axes += [op.family] * 2
    move = pixels.form().mover(pixels.Moves(jnp.concatenate(displacement), tuple(axes)), shape)

    def kind(op_index: Array, magnitude: Array) -> Array:
        return pixels.pick(first, op_index) + (magnitude < 0).astype(jnp.int32)

    return _Move(families, group, move, kind)


def _check_images(images: Array) -> None:
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != jnp.uint8:
        raise UserError(
            "RandAugment needs uint8 images of shape (B, H, W, 1) or (B, H, W, 3), got"
            f" {images.dtype} {images.shape}"
        )


@jax.jit
def apply_op(images: Array, op_index: Array, signed_magnitude: Array) -> Array:
    """Apply to each image its own operation, of any magnitude.

    Args:
      images: (B, H, W, C) uint8, C 1 or 3.
      op_index: (B,) integers, positions in `OPS`.
      signed_magnitude: (B,) float32, in the unit of the operation; ignored where it has none.

    Returns:
      (B, H, W, C) uint8.

    Raises:
      UserError: `images` are not as above.
    """
    _check_images(images)
    batch, height, width, _ = images.shape
    magnitude = signed_magnitude.astype(jnp.float32)
    displacement, families = jnp.zeros((batch, 2, 3), jnp.float32), ("x", "y", "xy")
    for family in families:
        displacement = _choose(family, op_index, displacement, magnitude, height, width)
    move = pixels.form().mover(pixels.Moves(displacement, ("xy",) * batch), (height, width))
    moves = [_Move(families, 24, move, lambda op_index, m: jnp.arange(batch))]
    planes = _apply(jnp.moveaxis(images, 3, 1), op_index, magnitude, moves)
    return jnp.moveaxis(planes, 1, 3)


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
    _check_images(images)
    _check_options(images, keys, num_ops, magnitude, num_magnitude_bins)
    augment = functools.partial(
        _rand_augment, num_ops=num_ops, magnitude=magnitude, bins=num_magnitude_bins
    )
    return sharding.on_each_device(augment, len(images))(images, keys)


def _rand_augment(images: Array, keys: Array, num_ops: int, magnitude: int, bins: int) -> Array:
    op_index, sign = sample_ops(keys, num_ops)
    _, height, width, _ = images.shape
    tables = [op.magnitudes(bins, height, width) for op in OPS.values()]
    strength = np.asarray([table[magnitude] for table in tables])
    signed = np.asarray([op.signed for op in OPS.values()], np.int32)
    sign = jnp.where(pixels.pick(signed, op_index) > 0, sign, 1.0)
    shape = images.shape[1:3]
    moves = [_move(("x", "y"), 24, strength, shape), _move(("xy",), 8, strength, shape)]

    def step(planes: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        return _apply(planes, *drawn, moves), None

    drawn = (op_index.T, (pixels.pick(strength, op_index) * sign).T)
    planes = jax.lax.scan(step, jnp.moveaxis(images, 3, 1), drawn)[0]
    return jnp.moveaxis(planes, 1, 3)
