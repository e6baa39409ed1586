"""What RandAugment does with pixels by their level or place, in one form for each kind of hardware.

CPUs read and write single elements fast: `INDEXED` is made of gathers and scatters. TPUs process
those one element at a time. `DENSE` has none of them: it selects by the bits of a level, and counts
and moves pixels by products with matrices of zeros and ones. Both give the same integers.

Axis legend: B batch, C channels, H height, W width, K kinds of moves. Images are planes,
(B, C, H, W), of uint8 where nothing else is said.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from kdgqa_jax import sharding

Array = jax.Array

LEVELS = 256


class Moves(NamedTuple):
    """K ways to find where pixels are taken from.

    Attributes:
      displacement: (K, 2, 3) float32, what to add to a pixel's position to find its source. Rows
        are x and y. Columns are the change per pixel to the right, the change per pixel down, and
        the displacement of the top left pixel's centre, in pixels.
      axes: for each way the rows that may differ from zero: "", "x", "y" or "xy".
    """

    displacement: Array
    axes: tuple[str, ...]


class Form(NamedTuple):
    """One way to do the work.

    Attributes:
      boxes: planes -> (B, C, H, W) int32, the sum over 3x3 pixels, the middle one counted five
        times. The border is undefined.
      histogram: planes -> (B, C, 256) int32 counts.
      look_up: (planes, lut (B, C, 256) uint8) -> lut[planes], of any integer type.
      mover: (moves, (H, W)) -> a function of (planes, kind (B,) int32, the way of each image) that
        gives the nearest source pixels; black where they lie outside.
    """

    boxes: Callable[[Array], Array]
    histogram: Callable[[Array], Array]
    look_up: Callable[[Array, Array], Array]
    mover: Callable[[Moves, tuple[int, int]], Callable[[Array, Array], Array]]


def on_chosen(
    function: Callable[..., Array], chosen: Array, planes: Array, *arguments: Array, group: int
) -> Array:
    """`function` of the chosen images, a group at a time; the others stay as they are.

    What it costs follows the number of images that are chosen, in steps of `group`. No image is
    gathered or scattered: images are sliced out and written back one by one.

    Args:
      function: (planes, *arguments) of a group -> planes of the same shape and dtype.
      chosen: (B,) bool.
      planes: (B, C, H, W).
      arguments: (B,) each.
      group: how many images are processed at once, at most.
    """
    order, count = jnp.argsort(~chosen, stable=True), jnp.sum(chosen)
    group = min(group, len(planes))

    def process(i: Array, planes: Array) -> Array:
        # What the last group lacks are repetitions of the last image: all give the same.
        places = jnp.minimum(i * group + jnp.arange(group), count - 1)
        indices = pick(order, places)
        one_by_one = [indices[j] for j in range(group)]
        images = [jax.lax.dynamic_slice_in_dim(planes, j, 1) for j in one_by_one]
        new = function(_row_major(jnp.concatenate(images)), *(pick(x, indices) for x in arguments))
        planes, new = jax.lax.optimization_barrier(  # all is read, so write in place
            (_row_major(planes), _row_major(new))
        )
        for j, index in enumerate(one_by_one):
            planes = jax.lax.dynamic_update_slice_in_dim(planes, new[j : j + 1], index, 0)
        return planes

    return jax.lax.fori_loop(0, -(-count // group), process, _row_major(planes))


def pick(table: Array | np.ndarray, index: Array) -> Array:
    """`table[index]` of a vector without a gather; 0 where there is no such entry."""
    entry = jnp.expand_dims(np.arange(len(table), dtype=np.int32), tuple(range(index.ndim)))
    table = jnp.expand_dims(table, tuple(range(index.ndim)))
    return jnp.sum(jnp.where(index[..., None] == entry, table, 0), axis=-1, dtype=table.dtype)


def _row_major(x: Array) -> Array:
    """The same array, each image in one piece: for slices of single images."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _fixed(displacement: Array) -> Array:
    """(K, 2, 3) -> (2, 3, K, 1, 1) int32, in PIL's fixed point numbers of 1/65536 pixel."""
    scaled = displacement * 65536
    floor = jnp.floor(scaled)
    fixed = floor.astype(jnp.int32) + (scaled - floor >= 0.5).astype(jnp.int32)
    return jnp.moveaxis(fixed, 0, 2)[..., None, None]


def _offset(fixed: Array, x: Array, y: Array) -> Array:
    """How far the source of the pixel at (x, y) is from it, on the axis of `fixed` (3, K, 1, 1)."""
    return (fixed[0] * x + fixed[1] * y + fixed[2] + 32768) >> 16


def _places(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """y (1, H, 1) and x (1, 1, W), int32."""
    y, x = (np.arange(side, dtype=np.int32) for side in shape)
    return y[None, :, None], x[None, None]


# --- by index ------------------------------------------------------------------------------------


def _add_neighbours(planes: Array) -> Array:
    levels = planes.astype(jnp.int32)
    padded = jnp.pad(levels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * levels


def _count(planes: Array) -> Array:
    def count(levels: Array) -> Array:
        return jnp.zeros(LEVELS, jnp.int32).at[levels].add(1, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(count))(planes.reshape(*planes.shape[:2], -1).astype(jnp.int32))


def _take_entries(planes: Array, lut: Array) -> Array:
    levels = planes.reshape(*planes.shape[:2], -1).astype(jnp.int32)
    found = jnp.take_along_axis(lut, levels, axis=2, mode="promise_in_bounds")
    return found.reshape(planes.shape)


def _pixel_taker(moves: Moves, shape: tuple[int, int]) -> Callable[[Array, Array], Array]:
    y, x = _places(shape)
    height, width = shape

    def take(planes: Array, kind: Array) -> Array:
        fixed = _fixed(moves.displacement[kind])
        column, row = x + _offset(fixed[0], x, y), y + _offset(fixed[1], x, y)  # (B, H, W)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        index = jnp.where(inside, row * width + column, 0).reshape(len(planes), 1, -1)
        flat = planes.reshape(*planes.shape[:2], -1)
        found = jnp.take_along_axis(flat, index, axis=2, mode="promise_in_bounds")
        return jnp.where(inside[:, None], found.reshape(planes.shape), 0)

    return take


INDEXED = Form(_add_neighbours, _count, _take_entries, _pixel_taker)


# --- dense ---------------------------------------------------------------------------------------


def _product(equation: str, *factors: Array) -> Array:
    """An einsum of integers up to 256, which bfloat16 holds exactly, with sums up to 2**24."""
    factors = [factor.astype(jnp.bfloat16) for factor in factors]
    return jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)


def _multiply_neighbours(planes: Array) -> Array:
    """Sums of neighbours as products with matrices of three diagonals, first over columns."""
    near_y, near_x = (
        np.abs(np.subtract.outer(i, i)) <= 1 for i in map(np.arange, planes.shape[2:])
    )
    rows = _product("BCHW,HI->BCIW", planes, jnp.asarray(near_y)).astype(jnp.int32)
    high, low = (  # of sums up to 765
        _product("BCHW,WX->BCHX", part, jnp.asarray(near_x)).astype(jnp.int32)
        for part in (rows >> 2, rows & 3)
    )
    return 4 * high + low + 4 * planes.astype(jnp.int32)


def _multiply_halves(planes: Array) -> Array:
    """How often the upper and the lower four bits of a level meet: a product over pixels."""
    levels = planes.astype(jnp.int32)[:, :, None]
    halves = np.arange(16, dtype=np.int32)[None, None, :, None, None]
    counts = _product("BCSHW,BCTHW->BCST", levels >> 4 == halves, levels & 15 == halves)
    return counts.reshape(*planes.shape[:2], LEVELS).astype(jnp.int32)


def _select_entries(planes: Array, lut: Array) -> Array:
    """Each bit of the level halves the entries; the last two bits shift a word of four entries."""
    levels = planes.astype(jnp.int32)
    quads = lut.astype(jnp.int32).reshape(*lut.shape[:2], -1, 4)
    packed = quads[..., 0] | quads[..., 1] << 8 | quads[..., 2] << 16 | quads[..., 3] << 24
    words = [packed[:, :, i, None, None] for i in range(LEVELS // 4)]
    for bit in range(2, 8):
        is_set = levels & (1 << bit) != 0
        pairs = zip(words[::2], words[1::2], strict=True)
        words = [jnp.where(is_set, one, zero) for zero, one in pairs]
    return words[0] >> 8 * (levels & 3) & 255


def _place_multiplier(moves: Moves, shape: tuple[int, int]) -> Callable[[Array, Array], Array]:
    """Pixels are moved along rows first, to the column that needs them, then along columns.

    After the first pass, row v has at column x what the output takes from row v there. The output
    row that does so is the first one whose source lies in row v. Where a rotation presses rows
    together, the row below takes from row v as well, from another column: it has a second image.
    A rotation by less than 60 degrees needs no third.
    """
    fixed_x, fixed_y = _fixed(moves.displacement)
    y, x = _places(shape)
    down, v = x.swapaxes(1, 2), y.swapaxes(1, 2)  # (1, W, 1) and (1, 1, H): images are transposed
    start = fixed_y[0] * down + fixed_y[2] + 32768
    first = -((start - (v << 16)) // (65536 + fixed_y[1]))  # (K, W, H): y by x and v
    columns = [down + _offset(fixed_x, down, row) for row in (first, first + 1)]
    row = y + _offset(fixed_y, x, y)  # (K, H, W)

    def take(values: Array, *axes: str, keep: bool) -> Callable[[Array, Array], Array]:
        rows = {k: values[k] for k, named in enumerate(moves.axes) if named in axes}
        return _taker(rows, keep and len(rows) < len(moves.axes))

    turns = "xy" in moves.axes
    below = y - 1 + _offset(fixed_y, x, y - 1) == row if turns else False
    across = take(columns[0], "x", "xy", keep=True)
    along = take(jnp.where(below, -1, row), "y", "xy", keep=True)
    if turns:
        across_too = take(columns[1], "xy", keep=False)
        along_too = take(jnp.where(below, row, -1), "xy", keep=False)

    def move(planes: Array, kind: Array) -> Array:
        turned = planes.swapaxes(2, 3)
        moved = along(across(turned, kind).swapaxes(2, 3), kind)
        if turns:
            moved += along_too(across_too(turned, kind).swapaxes(2, 3), kind)
        return moved.astype(jnp.uint8)

    return move


def _taker(rows: Mapping[int, Array], keep: bool) -> Callable[[Array, Array], Array]:
    """(planes, kind) -> `planes[b, c, rows[kind[b]][i, j], j]`, 0 outside, as bfloat16.

    Images of a kind that is not in `rows` stay as they are (`keep`), or become 0. One product
    serves all kinds: K copies of the images, each empty but for those of its kind.
    """
    shape = next(iter(rows.values())).shape
    places = np.arange(shape[0], dtype=np.int32)
    sources = [*rows.values()]
    if keep:
        sources.append(jnp.broadcast_to(places[:, None], shape))
    # Behind a barrier, lest the compiler compute the sources again for each of their uses.
    source = jax.lax.optimization_barrier(jnp.stack(sources))

    def take(planes: Array, kind: Array) -> Array:
        chosen = [kind == k for k in rows]
        if keep:
            chosen.append(~jnp.any(jnp.stack(chosen), axis=0))
        images = jnp.where(jnp.stack(chosen, axis=1)[:, None, :, None, None], planes[:, :, None], 0)
        matches = source[:, None] == places[None, :, None, None]
        return _product("BCKHW,KHIW->BCIW", images, matches).astype(jnp.bfloat16)

    return take


DENSE = Form(_multiply_neighbours, _multiply_halves, _select_entries, _place_multiplier)

FORMS: dict[str, Form] = {"cpu": INDEXED}
"""By platform; the others take `DENSE`."""


def form() -> Form:
    """The form of the platform that a program is traced for (see `sharding.platform`)."""
    return FORMS.get(sharding.platform(), DENSE)
