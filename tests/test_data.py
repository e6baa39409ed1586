"""Data sources, and how images become input of a model."""

import gzip
import struct

import helpers
import numpy as np
import pytest
from sklearn.datasets import load_digits
from source_helpers import write_idx

from kdgqa_jax.data import augment, identity, sources
from kdgqa_jax.data.dataset import Dataset, check_dataset
from kdgqa_jax.errors import UserError


@pytest.fixture
def idx_dir(tmp_path):
    """A directory of the four files, with 12 training and 5 test images."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


def test_digits_are_the_real_images_once_each():
    dataset = sources.load("digits")
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.image_shape == (8, 8, 1)
    images, labels = load_digits(return_X_y=True)
    whole = [*dataset.train, *dataset.test]
    mine = sorted((x["label"], (x["image"] / 255 * 16).round().tobytes()) for x in whole)
    assert mine == sorted(
        (label, image.tobytes()) for image, label in zip(images, labels, strict=True)
    )
    counts = np.bincount([x["label"] for x in dataset.test])
    assert counts.min() >= 34 and counts.max() <= 37  # stratified


def test_digits_split_is_fixed():
    first, second = sources.load("digits"), sources.load("digits")
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert first.test.labels[:10].tolist() == second.test.labels[:10].tolist()


def test_idx_files_are_read_as_written(idx_dir):
    dataset = sources.load("fashion_mnist", str(idx_dir))
    assert (len(dataset.train), len(dataset.test)) == (12, 5)
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names[9] == "Ankle boot"
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    np.testing.assert_array_equal(dataset.train.images[..., 0], expected)
    assert dataset.train[3]["label"] == 3


def _missing(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()


def _truncated(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])


def _short(folder):
    raw = bytes([0, 0, 8, 1]) + struct.pack(">I", 12) + bytes(7)
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(raw))


def _not_idx(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"hello world"))


def _label_out_of_range(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.full(12, 10))


def _other_count(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing, "t10k-labels-idx1-ubyte.gz not found"),
        (_truncated, "train-images-idx3-ubyte.gz: not a readable gzip file"),
        (_short, "holds 7 bytes of data where its header"),
        (_not_idx, "not an IDX file"),
        (_label_out_of_range, "label 10 is out of range for 10 classes"),
        (_other_count, "do not belong together"),
    ],
)
def test_damaged_idx_directory_is_refused(idx_dir, damage, says):
    damage(idx_dir)
    with pytest.raises(UserError, match=says):
        sources.load("fashion_mnist", str(idx_dir))


def test_a_split_without_images_is_refused(idx_dir):
    write_idx(idx_dir / "train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)))
    write_idx(idx_dir / "train-labels-idx1-ubyte.gz", np.zeros(0))
    with pytest.raises(UserError, match="'fashion_mnist' has no images to train on"):
        sources.load("fashion_mnist", str(idx_dir))


def test_unknown_names_and_missing_directory_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        sources.load("digit")
    with pytest.raises(UserError, match="unknown shift 'quarter': did you mean 'quarter_turn'"):
        sources.load("digits", shift="quarter")
    with pytest.raises(UserError, match="needs a data directory"):
        sources.load("fashion_mnist")
    with pytest.raises(UserError, match="not found"):
        sources.load("fashion_mnist", str(tmp_path / "nowhere"))


def test_shift_turns_and_inverts_every_image():
    plain, shifted = sources.load("digits"), sources.load("digits", shift="negative_quarter_turn")
    image, turned = plain.test[7]["image"], shifted.test[7]["image"]
    for row in range(8):
        for column in range(8):  # counter-clockwise: the last column becomes the first row
            assert turned[row, column, 0] == 255 - image[column, 7 - row, 0]
    assert shifted.test[7]["label"] == plain.test[7]["label"]
    assert len(shifted.train) == len(plain.train)


def test_model_input_is_normalised_and_resized():
    images = np.array([[[[0], [255]], [[51], [102]]]], np.uint8)
    plain = augment.to_model_input(images, (2, 2), 0.5, 0.5)
    helpers.assert_close(np.ravel(plain), np.array([-1, 1, -0.6, -0.2]), 1e-6)
    # Bilinear with half-pixel centres: the middle of a 2 -> 4 resize mixes 3:1.
    larger = np.asarray(augment.to_model_input(images, (4, 4), 0.0, 1.0))[0, :, :, 0]
    assert larger.shape == (4, 4)
    helpers.assert_close(larger[0], np.array([0, 0.25, 0.75, 1]), 1e-6)


def own_dataset(images=(6, 5, 1), dtype=np.uint8, label=1, names=("a", "b"), count=3):
    split = sources.ArraySplit(np.zeros((count, *images), dtype), np.full(count, label))
    return Dataset("own", names, split, split)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"names": ()}, r"data set 'own': class_names=\(\) must be names of classes"),
        ({"names": (0, 1)}, r"class_names=\(0, 1\) must be names"),
        ({"count": 0}, "has no images to train on"),
        ({"dtype": np.float32}, r"train\[0\]: the image is float32 of shape \(6, 5, 1\); expect"),
        ({"images": (6, 5)}, r"uint8 of shape \(6, 5\); expected uint8 \(height, width, chan"),
        ({"images": (3, 6, 5)}, r"uint8 of shape \(3, 6, 5\); expected"),
        ({"label": 2}, r"train\[0\]: the label is array\(2.*\); expected an integer from 0 to 1"),
        ({"label": 0.0}, "expected an integer from 0 to 1"),
    ],
)
def test_a_data_set_of_ones_own_is_checked(changes, says):
    check_dataset(own_dataset())
    with pytest.raises(UserError, match=says):
        check_dataset(own_dataset(**changes))


def test_pairs_are_no_examples():
    pairs = [(np.zeros((6, 5, 1), np.uint8), 1)]
    with pytest.raises(UserError, match=r'train\[0\]: expected a dict with "image" and "label"'):
        check_dataset(Dataset("own", ("a", "b"), pairs, pairs))


@pytest.mark.parametrize("shift", ["none", "negative"])
def test_a_split_needs_no_listing(shift):
    items = [{"image": np.zeros((6, 5, 1), np.uint8), "label": 1}] * 2
    described = identity.describe(sources.shifted(Dataset("own", ("a", "b"), items, items), shift))
    assert described["train"]["images"] == 2


def test_an_unknown_shift_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="unknown shift 'negativ'"):
        sources.load("mnist", str(tmp_path / "none"), "negativ")
