"""Shares of a data set and wrong labels: how many, which, and always the same ones."""

import numpy as np
import pytest
from PIL import Image

from kdgqa_jax.config import train_config
from kdgqa_jax.data import identity, pipeline, sources, subsets
from kdgqa_jax.errors import UserError


def digits(seed=0, **changes):
    config = train_config()
    config.update_from_flattened_dict({f"data.{name}": x for name, x in changes.items()})
    return subsets.load(config.data, seed)


def labels(split):
    return np.array([split[i]["label"] for i in range(len(split))])


def pixels(split):
    return [split[i]["image"].tobytes() for i in range(len(split))]


def test_all_of_it_is_the_data_set_itself():
    assert digits().train is not None and len(digits().train) == 1437
    whole = sources.load("digits")
    np.testing.assert_array_equal(digits().train.labels, whole.train.labels)


def test_a_share_is_drawn_by_the_seed_and_grows():
    data = sources.load("digits").train
    whole = dict(zip(pixels(data), data.labels, strict=True))
    half, tenth = digits(train_share=0.5), digits(train_share=0.1)
    assert (len(half.train), len(tenth.train), len(half.test)) == (718, 144, 360)
    assert pixels(half.train)[:144] == pixels(tenth.train) == pixels(digits(train_share=0.1).train)
    assert pixels(digits(1, train_share=0.1).train) != pixels(tenth.train)
    assert all(whole[x] == y for x, y in zip(pixels(half.train), labels(half.train), strict=True))


def test_test_images_of_a_share_are_those_of_every_seed():
    one, other = (digits(seed, test_share=0.2).test for seed in (0, 1))
    assert len(one) == 72 and pixels(one) == pixels(other)


def test_wrong_labels_are_other_classes_and_as_many_as_asked_for():
    right, noisy = digits(), digits(label_noise=0.3)
    wrong = labels(noisy.train) != labels(right.train)
    assert wrong.sum() == round(0.3 * 1437)
    assert pixels(noisy.train) == pixels(right.train)
    np.testing.assert_array_equal(labels(noisy.test), labels(right.test))
    shifts = (labels(noisy.train) - labels(right.train))[wrong] % 10
    counts = np.bincount(shifts, minlength=10)
    assert counts[0] == 0 and counts[1:].min() > 0.5 * wrong.sum() / 9
    np.testing.assert_array_equal(labels(noisy.train), labels(digits(label_noise=0.3).train))
    assert (labels(digits(1, label_noise=0.3).train) != labels(noisy.train)).any()
    both = digits(label_noise=0.3, train_share=0.2)
    assert pixels(both.train) == pixels(digits(train_share=0.2).train)


def test_files_are_still_opened_one_by_one(tmp_path):
    """Resizing takes the short way through `open`, with the label that was drawn."""
    for label, name in enumerate("ab"):
        for i in range(10):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (9, 9), (100 * label, i, 0)).save(path)
    dataset = digits(name=f"folder:{tmp_path}", label_noise=0.5)
    config = train_config().data
    prepared = pipeline.prepare(dataset, (4, 4), config).train
    assert hasattr(dataset.train, "open")
    wrong = sum(int(item["image"][0, 0, 0] // 100) != item["label"] for item in prepared)
    assert wrong == 9 and prepared[0]["image"].shape == (4, 4, 3)


def test_other_parts_have_other_fingerprints():
    parts = [digits(), digits(train_share=0.5), digits(1, train_share=0.5), digits(label_noise=0.1)]
    prints = [identity.describe(part)["train"]["fingerprint"] for part in parts]
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train_share": 0.0}, "data.train_share=0.0 must be above 0, at most 1"),
        ({"test_share": 1.5}, "data.test_share=1.5 must be above 0, at most 1"),
        ({"label_noise": -0.1}, "data.label_noise=-0.1 must be at least 0 and below 1"),
    ],
)
def test_shares_out_of_range_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        digits(**changes)
