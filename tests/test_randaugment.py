"""RandAugment on the device against PIL itself, operation by operation."""

import functools
import inspect
import math
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_images

from kdgqa_jax.data import pixels
from kdgqa_jax.data.randaugment import OPS, apply_op, rand_augment, sample_ops
from kdgqa_jax.errors import UserError

BINS = 31
NAMES = list(OPS)
STRENGTHS = (0, 1, 3, 9, 10, 17, 20, 30)
LUTS = ("Posterize", "Solarize", "AutoContrast", "Equalize")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


# --- the reference -------------------------------------------------------------------------------


def move(image, shear=(0.0, 0.0), translate=(0, 0), center=(0.0, 0.0)):
    """torchvision's affine: the inverse of T C SHy SHx C^-1, multiplied out and inverted here."""

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)

    x, y = (math.tan(math.radians(math.degrees(math.atan(s)))) for s in shear)
    sheared = np.array([[1, 0, 0], [-y, 1, 0], [0, 0, 1]]) @ np.array(
        [[1, -x, 0], [0, 1, 0], [0, 0, 1]]
    )
    matrix = shift(*translate) @ shift(*center) @ sheared @ shift(*(-c for c in center))
    inverse = np.linalg.inv(matrix)[:2].ravel()
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)


def middle(image):
    return image.width / 2, image.height / 2


REFERENCE = {
    "Identity": lambda image, m: image,
    "ShearX": lambda image, m: move(image, shear=(m, 0.0)),
    "ShearY": lambda image, m: move(image, shear=(0.0, m)),
    "TranslateX": lambda image, m: move(image, translate=(int(m), 0), center=middle(image)),
    "TranslateY": lambda image, m: move(image, translate=(0, int(m)), center=middle(image)),
    "Rotate": lambda image, m: image.rotate(m, Image.Resampling.NEAREST),
    "Brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1.0 + m),
    "Color": lambda image, m: ImageEnhance.Color(image).enhance(1.0 + m),
    "Contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1.0 + m),
    "Sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1.0 + m),
    "Posterize": lambda image, m: ImageOps.posterize(image, int(m)),
    "Solarize": lambda image, m: ImageOps.solarize(image, m),
    "AutoContrast": lambda image, m: ImageOps.autocontrast(image),
    "Equalize": lambda image, m: ImageOps.equalize(image),
}


def to_pil(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def reference(image, name, magnitude):
    """What PIL makes of an (H, W, C) image, with the same axes."""
    changed = np.asarray(REFERENCE[name](to_pil(image), float(magnitude)))
    return changed.reshape(image.shape)


# --- images --------------------------------------------------------------------------------------


@functools.cache
def photos():
    return [Image.fromarray(image) for image in load_sample_images().images]


def resized():
    return np.stack([np.asarray(photo.resize((128, 96))) for photo in photos()])


def cropped(mode):
    box = (200, 150, 283, 211)
    crops = [np.asarray(photo.convert(mode).crop(box)) for photo in photos()]
    return np.stack(crops).reshape(2, 61, 83, -1)


def digits(channels):
    images = (load_digits().images[:3] * (255 / 16)).astype(np.uint8)
    return np.repeat(images[..., None], channels, axis=-1)


IMAGES = {
    "photos 96x128": resized,
    "grey photos 61x83": functools.partial(cropped, "L"),
    "digits": functools.partial(digits, 1),
    "digits RGB": functools.partial(digits, 3),
}


# --- one operation -------------------------------------------------------------------------------


def cases(height, width):
    """(name, magnitude) of every operation: all bins of tables, several of the others."""
    for name, op in OPS.items():
        magnitudes = op.magnitudes(BINS, height, width)
        chosen = magnitudes if name in LUTS else magnitudes[list(STRENGTHS)]
        for magnitude in np.unique(chosen):
            yield name, magnitude
            if op.signed:
                yield name, -magnitude


@pytest.fixture(scope="module", params=IMAGES)
def compared(request):
    """{name: [(magnitude, ours, PIL's)]}, one call for all operations, magnitudes and images."""
    images = IMAGES[request.param]()
    todo = [(image, *case) for case in cases(*images.shape[1:3]) for image in images]
    stacked, names, magnitudes = zip(*todo, strict=True)
    index = jnp.array([NAMES.index(name) for name in names])
    ours = np.asarray(apply_op(jnp.asarray(np.stack(stacked)), index, jnp.array(magnitudes)))
    assert ours.dtype == np.uint8
    results = {name: [] for name in NAMES}
    for (image, name, magnitude), mine in zip(todo, ours, strict=True):
        results[name].append((magnitude, mine, reference(image, name, magnitude)))
    return results


@pytest.mark.parametrize("name", ["Identity", *LUTS])
def test_tables_are_exactly_pils(compared, name):
    for magnitude, mine, theirs in compared[name]:
        np.testing.assert_array_equal(mine, theirs, err_msg=f"{name} {magnitude}")


@pytest.mark.parametrize("name", BLENDS)
def test_blends_are_pils_within_one_grey_level(compared, name):
    """And exactly where PIL's compiler does not fuse multiplication and addition: on x86."""
    for magnitude, mine, theirs in compared[name]:
        off = np.abs(mine.astype(int) - theirs)
        assert off.max() <= 1, f"{name} {magnitude}"
        assert np.mean(off > 0) <= 0.15, f"{name} {magnitude}"


@pytest.mark.parametrize("name", MOVES)
def test_moves_take_the_pixels_that_pil_takes(compared, name):
    for magnitude, mine, theirs in compared[name]:
        same = np.all(mine == theirs, axis=-1)
        assert same.mean() >= 0.99, f"{name} {magnitude}"


def test_autocontrast_truncates_where_pil_does():
    """PIL's float64 quotients of whole numbers often end one below: all spreads, every 13th low."""
    ends = np.array([(low, high) for low in range(0, 256, 13) for high in range(low, 256)])
    images = np.clip(np.arange(256), ends[:, :1], ends[:, 1:]).astype(np.uint8)[:, None, :, None]
    index = jnp.full(len(images), NAMES.index("AutoContrast"))
    ours = np.asarray(apply_op(jnp.asarray(images), index, jnp.zeros(len(images))))
    theirs = [reference(image, "AutoContrast", 0.0) for image in images]
    np.testing.assert_array_equal(ours, theirs)


def test_magnitudes_are_torchvisions():
    for bins in (2, 10, 31):
        ends = {
            "ShearX": (0.0, 0.3),
            "ShearY": (0.0, 0.3),
            "TranslateX": (0.0, 150 / 331 * 200),
            "TranslateY": (0.0, 150 / 331 * 100),
            "Rotate": (0.0, 30.0),
            **dict.fromkeys(BLENDS, (0.0, 0.9)),
            "Solarize": (255.0, 0.0),
        }
        for name, (start, stop) in ends.items():
            mine = OPS[name].magnitudes(bins, 100, 200)
            assert mine.dtype == np.float32
            helpers.assert_close(mine, np.linspace(start, stop, bins), 2e-7)
    assert OPS["TranslateX"].magnitudes(31, 8, 331)[::3].tolist() == list(range(0, 151, 15))
    bits = OPS["Posterize"].magnitudes
    assert bits(31, 8, 8).tolist() == [8] * 4 + [7] * 8 + [6] * 7 + [5] * 8 + [4] * 4
    assert bits(9, 8, 8).tolist() == [8, 8, 7, 6, 6, 6, 5, 4, 4]  # halves go to the even one


def test_operations_are_torchvisions():
    names = "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast"
    assert [*names.split(), "Sharpness", *LUTS] == NAMES
    assert {name for name, op in OPS.items() if op.signed} == {*MOVES, *BLENDS}


# --- random operations ---------------------------------------------------------------------------

BATCH = 24
OPTIONS = {"num_ops": 3, "magnitude": 14, "num_magnitude_bins": 21}
draw = jax.jit(sample_ops, static_argnums=1)


@pytest.fixture(scope="module")
def batch():
    """(images (24, 61, 83, 3), keys (24,)): few enough to have images without a table."""
    images = jnp.asarray(np.concatenate([cropped("RGB")] * (BATCH // 2)))
    return images, jax.random.split(jax.random.key(0), BATCH)


@pytest.fixture(scope="module")
def drawn(batch):
    """What `batch` gets: (op_index (24, 3), sign (24, 3))."""
    return [np.asarray(x) for x in draw(batch[1], OPTIONS["num_ops"])]


@pytest.fixture(scope="module")
def augmented(batch):
    return np.asarray(rand_augment(*batch, **OPTIONS))


def test_random_operations_are_the_sampled_ones_in_turn(batch, drawn, augmented):
    images, _ = batch
    ops = list(OPS.values())
    for op_index, sign in zip(*(x.T for x in drawn), strict=True):
        signs = [s if ops[i].signed else 1.0 for i, s in zip(op_index, sign, strict=True)]
        strength = [ops[i].magnitudes(21, 61, 83)[14] for i in op_index]
        images = apply_op(images, op_index, np.multiply(strength, signs))
    np.testing.assert_array_equal(augmented, images)
    assert len(np.unique(drawn[0])) > 10
    assert set(np.unique(drawn[1])) == {-1.0, 1.0}


def test_an_image_does_not_depend_on_its_batch(batch, drawn, augmented):
    images, keys = batch
    has_table = np.isin(drawn[0], [NAMES.index(name) for name in LUTS]).any(axis=1)
    assert 0 < has_table.sum() < BATCH
    order = np.random.default_rng(0).permutation(BATCH)
    for chosen in (order, [np.argmax(has_table)] * BATCH, [np.argmin(has_table)] * BATCH):
        chosen = np.array(chosen)
        again = rand_augment(images[chosen], keys[chosen], **OPTIONS)
        np.testing.assert_array_equal(again, augmented[chosen])


def test_keys_decide_and_batches_share_a_compilation(batch, augmented):
    images, keys = batch
    compiled = rand_augment._cache_size()
    np.testing.assert_array_equal(rand_augment(images, keys, **OPTIONS), augmented)
    other_keys = jax.random.split(jax.random.key(1), BATCH)
    others = np.asarray(rand_augment(images, other_keys, **OPTIONS))
    assert np.mean(np.any(others != augmented, axis=(1, 2, 3))) > 0.8
    rand_augment(images[::-1], other_keys, **OPTIONS)
    assert rand_augment._cache_size() == compiled > 0


# --- forms for other hardware --------------------------------------------------------------------


@pytest.fixture
def dense(monkeypatch):
    """`rand_augment` as on a TPU or GPU."""
    monkeypatch.setattr(pixels, "FORMS", {})
    return jax.jit(rand_augment.__wrapped__, static_argnames=tuple(OPTIONS))


@pytest.mark.parametrize(
    ("shape", "magnitude"),
    [((40, 56, 3), 9), ((40, 24, 3), 30), ((32, 32, 1), 17), ((1, 5, 1), 9), ((2, 2, 3), 26)],
)
def test_dense_form_gives_the_same_pixels(dense, shape, magnitude):
    images = np.random.default_rng(magnitude).integers(0, 256, (112, *shape), np.uint8)
    keys = jax.random.split(jax.random.key(magnitude), 112)
    indexed = rand_augment(images, keys, 2, magnitude)
    drawn, signs = draw(keys, 2)
    assert len({*zip(drawn.ravel().tolist(), signs.ravel().tolist(), strict=True)}) == 28
    np.testing.assert_array_equal(dense(images, keys, 2, magnitude), indexed)


def test_dense_form_of_photos_is_the_same(dense, batch, augmented):
    np.testing.assert_array_equal(dense(*batch, **OPTIONS), augmented)


def test_dense_form_has_no_gather_and_no_scatter(dense):
    """A TPU processes them one element at a time."""
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.uint8)
    keys = jax.ShapeDtypeStruct((16,), jax.random.key(0).dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        traced = dense.trace(images, keys)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.dot_general" in text
        assert not re.findall(r"stablehlo\.\w*(?:gather|scatter)", text)


def test_no_operations_and_defaults(batch):
    images, keys = batch[0][:2, :8, :8], batch[1][:2]
    np.testing.assert_array_equal(rand_augment(images, keys, num_ops=0), images)
    defaults = {name: p.default for name, p in inspect.signature(rand_augment).parameters.items()}
    assert list(defaults.values())[2:] == [2, 9, 31]


def chi_square(counts):
    expected = counts.sum() / counts.size
    return np.sum((counts - expected) ** 2) / expected


def test_operations_and_signs_are_uniform_and_independent():
    op_index, sign = map(np.asarray, draw(jax.random.split(jax.random.key(0), 20_000), 2))
    assert op_index.shape == sign.shape == (20_000, 2)
    joint = np.zeros((14, 2, 14, 2))
    positive = (sign > 0).astype(int)
    np.add.at(joint, (op_index[:, 0], positive[:, 0], op_index[:, 1], positive[:, 1]), 1)
    # 0.999 quantiles of chi square, by degrees of freedom
    assert chi_square(joint.sum((1, 2, 3))) < 34.5  # 13: the first operation
    assert chi_square(joint.sum((0, 1, 3))) < 34.5  # 13: the second
    assert chi_square(joint.sum((2, 3))) < 55.5  # 27: an operation and its sign
    assert chi_square(joint.sum((1, 3))) < 260.0  # 195: both operations
    assert chi_square(joint.sum((0, 2))) < 16.3  # 3: both signs


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ops": -1}, "num_ops=-1 must be"),
        ({"num_ops": 1.5}, "num_ops=1.5 must be"),
        ({"magnitude": -1}, "magnitude=-1 must be an integer in 0..30"),
        ({"magnitude": 31}, "magnitude=31 must be an integer in 0..30"),
        ({"magnitude": 10, "num_magnitude_bins": 10}, r"in 0\.\.9"),
        ({"num_magnitude_bins": 1, "magnitude": 0}, "num_magnitude_bins=1 must be"),
        ({"keys": jax.random.key(0)}, "one typed key"),
        ({"keys": jnp.zeros((2, 2), jnp.uint32)}, "one typed key"),
        ({"images": jnp.zeros((2, 8, 8, 3))}, "needs uint8 images"),
        ({"images": jnp.zeros((2, 8, 8, 4), jnp.uint8)}, "needs uint8 images"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    arguments = {
        "images": jnp.zeros((2, 8, 8, 3), jnp.uint8),
        "keys": jax.random.split(jax.random.key(0), 2),
    }
    with pytest.raises(UserError, match=message):
        rand_augment(**{**arguments, **options})
