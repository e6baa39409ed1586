"""Augmentation on the device: each step against its definition, and independence of batch mates."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from kdgqa_jax.data import augment
from kdgqa_jax.errors import UserError

OFF = {"rand_augment_ops": 0}
B, SIDE, CLASSES = 64, 12, 5


def config(**changes):
    settings = augment.augment_config()
    settings.update({**OFF, **changes})
    return FrozenConfigDict(settings)


def batch(seed=0, channels=3):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (B, SIDE, SIDE, channels), np.uint8)
    return images, rng.integers(0, CLASSES, B).astype(np.int32)


@functools.lru_cache
def step(settings, image_shape=(SIDE, SIDE), mean=0.0, std=1.0):
    return helpers.fast_jit(
        lambda images, labels, seed: augment.training_batch(
            images, labels, jax.random.key(seed), settings, image_shape, CLASSES, mean, std
        )
    )


def run(settings, images, labels, seed=0, **options):
    out, targets = step(settings, **options)(images, labels, seed)
    return np.asarray(out) * 255.0, np.asarray(targets)


def test_nothing_asked_for_nothing_done():
    images, labels = batch()
    out, targets = run(config(), images, labels)
    helpers.assert_close(out, images, 1e-5)
    np.testing.assert_array_equal(targets, labels)
    half, _ = step(config(), mean=0.5, std=0.25)(images, labels, 0)
    helpers.assert_close(half, (images / 255.0 - 0.5) / 0.25, 1e-5)


def test_resize_comes_last():
    images, labels = batch()
    large, _ = run(config(), images, labels, image_shape=(24, 18))
    expected = jax.image.resize(images.astype(np.float32), (B, 24, 18, 3), "bilinear")
    helpers.assert_close(large, expected, 1e-5)


def test_flip_turns_about_half_of_the_images():
    images, labels = batch()
    out, _ = run(config(flip=True), images, labels)
    same = np.isclose(out, images, atol=1e-2).all((1, 2, 3))
    turned = np.isclose(out, images[:, :, ::-1], atol=1e-2).all((1, 2, 3))
    assert (same ^ turned).all() and 16 < turned.sum() < 48


def test_padded_crop_takes_every_offset_and_nothing_else():
    images, labels = batch()
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for seed in range(3):
        out, _ = run(config(pad_crop=1), images, labels, seed)
        for i in range(B):
            fits = [
                (top, left)
                for top in range(3)
                for left in range(3)
                if np.allclose(padded[i, top : top + SIDE, left : left + SIDE], out[i], atol=1e-2)
            ]
            assert len(fits) == 1
            seen |= set(fits)
    assert len(seen) == 9


def test_resized_crop_shows_a_part_of_the_image():
    """On an image whose pixels are their own coordinates, the part can be read off."""
    rows, columns = np.meshgrid(np.arange(SIDE) * 20, np.arange(SIDE) * 20, indexing="ij")
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    images, labels = np.broadcast_to(image, (B, SIDE, SIDE, 3)), np.zeros(B, np.int32)
    out, _ = run(config(resized_crop=0.25), images, labels, image_shape=(24, 24))
    steps = (
        np.diff(out / 20.0, axis=1)[:, 8:16, :, 0].mean((1, 2)),
        np.diff(out / 20.0, axis=2)[:, :, 8:16, 1].mean((1, 2)),
    )
    height, width = (24 * s for s in steps)  # of the part, in pixels of the image
    share, ratio = height * width / SIDE**2, width / height
    assert share.min() > 0.2 and share.max() < 1.05 and np.ptp(share) > 0.4
    assert ratio.min() > 0.7 and ratio.max() < 1.4 and np.ptp(ratio) > 0.2
    middle = out[:, 11:13, 11:13, 0].mean((1, 2)) / 20.0
    assert middle.min() >= 0 and middle.max() <= SIDE - 1 and np.ptp(middle) > 2


def test_erasing_zeroes_one_box_of_the_right_size():
    images, labels = batch()
    for rate, erased in ((1.0, B), (0.5, None)):
        out, _ = run(config(erase=rate), images, labels)
        gone = (out == 0).all(-1)
        count = 0
        for i in range(B):
            if gone[i].any():
                count += 1
                rows, columns = np.flatnonzero(gone[i].any(1)), np.flatnonzero(gone[i].any(0))
                assert gone[i].sum() == len(rows) * len(columns)  # a box without gaps
                assert gone[i].mean() < 0.45
            helpers.assert_close(out[i][~gone[i]], images[i][~gone[i]], 1e-5)
        # A box narrower than a pixel may hold the centre of none.
        assert count >= 0.85 * B if erased else 16 < count < 48


def test_label_smoothing():
    images, labels = batch()
    _, targets = run(config(label_smoothing=0.1), images, labels)
    expected = np.full((B, CLASSES), 0.02)
    expected[np.arange(B), labels] += 0.9
    helpers.assert_close(targets, expected, 1e-6)


def test_mixup_mixes_images_and_labels_alike():
    images, labels = batch()
    one_hot, ratios = np.eye(CLASSES)[labels], []
    for seed in range(8):
        out, targets = run(config(mixup=1.0), images, labels, seed)
        # The ratio from the pixels; labels have to have the same.
        difference = images.astype(np.float64) - images[::-1]
        kept = np.sum((out - images[::-1]) * difference) / np.sum(difference**2)
        helpers.assert_close(out, kept * images + (1 - kept) * images[::-1], 1e-5)
        helpers.assert_close(targets, kept * one_hot + (1 - kept) * one_hot[::-1], 1e-5)
        ratios.append(kept)
    assert np.ptp(ratios) > 0.3 and min(ratios) >= 0 and max(ratios) <= 1


def test_cutmix_pastes_one_box_and_counts_its_pixels():
    images, labels = batch()
    one_hot, shares = np.eye(CLASSES)[labels], []
    for seed in range(8):
        out, targets = run(config(cutmix=1.0), images, labels, seed)
        old = np.isclose(out, images, atol=0.01).all(-1)
        new = np.isclose(out, images[::-1], atol=0.01).all(-1)
        assert (old | new).all()
        pasted = ~old.all(0) & new.all(0)
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)
        kept = 1 - pasted.mean()
        helpers.assert_close(targets, kept * one_hot + (1 - kept) * one_hot[::-1], 1e-5)
        shares.append(kept)
    assert np.ptp(shares) > 0.3


def test_mixup_and_cutmix_take_turns():
    images, labels = batch()
    pasted = []
    for seed in range(12):
        out, _ = run(config(mixup=1.0, cutmix=1.0), images, labels, seed)
        whole = np.isclose(out, images, atol=0.01) | np.isclose(out, images[::-1], atol=0.01)
        pasted.append(whole.all())
    assert 2 <= sum(pasted) <= 10


EVERYTHING = {"flip": True, "pad_crop": 2, "rand_augment_ops": 2, "resized_crop": 0.5, "erase": 0.5}


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_does_not_depend_on_its_batch_mates(channels):
    images, labels = batch(0, channels)
    others, _ = batch(1, channels)
    others[7] = images[7]
    first, _ = run(config(**EVERYTHING), images, labels, 3)
    second, _ = run(config(**EVERYTHING), others, labels, 3)
    np.testing.assert_array_equal(first[7], second[7])
    again, _ = run(config(**EVERYTHING), images, labels, 3)
    np.testing.assert_array_equal(first, again)
    other_step, _ = run(config(**EVERYTHING), images, labels, 4)
    assert (np.abs(other_step - first).max((1, 2, 3)) > 1).mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"erase": 1.5}, "augment.erase=1.5 must be between 0 and 1"),
        ({"resized_crop": 0.0}, r"augment.resized_crop=0.0 must be in \(0, 1\]"),
        ({"mixup": -1.0}, "augment.mixup=-1.0 must not be negative"),
        ({"rand_augment_magnitude": 31}, "augment.rand_augment_magnitude=31 must be in 0..30"),
    ],
)
def test_options_out_of_range_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        augment.check(config(**changes))


def test_float_images_are_not_needed():
    """Hosts ship bytes: the step takes uint8 and gives float32."""
    images, labels = batch()
    out, _ = step(config(**EVERYTHING))(jnp.asarray(images), labels, 0)
    assert out.dtype == jnp.float32


def test_normalisation_per_channel():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    found = augment.to_model_input(images, (4, 4), mean, std)
    helpers.assert_close(found, (images / 255 - mean) / std, 1e-6)
