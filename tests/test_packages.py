"""Data sets that packages carry: their form on disk, and the packages themselves if installed."""

import importlib.util
import pathlib

import numpy as np
import pytest
from PIL import Image
from source_helpers import noise, refused, save

from kdgqa_jax.data import packages, sources

LEVELS = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
STAMPS_FROM = pathlib.Path(packages.STAMPS)


def write_elpv(root, counts):
    """Cells as the package has them: `counts` by (level, type), in turns."""
    lines = []
    for (level, kind), count in counts.items():
        for _ in range(count):
            file = f"images/cell{len(lines) + 1:04}.png"
            save(root / file, noise(len(lines), 6, 6))
            lines.append(f"{file}  {LEVELS[level]:<18} {kind}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return lines


def test_elpv_is_split_by_level_and_type(tmp_path):
    counts = {(0, "mono"): 8, (0, "poly"): 4, (1, "poly"): 4, (2, "mono"): 2, (3, "poly"): 5}
    write_elpv(tmp_path, counts)
    dataset = sources.load("elpv", str(tmp_path))
    assert dataset.class_names == ("0 %", "33 %", "67 %", "100 %")
    assert np.bincount(dataset.test.labels).tolist() == [2 + 1, 1, 1, 1]
    assert np.bincount(dataset.train.labels).tolist() == [6 + 3, 3, 1, 4]
    assert set(dataset.train.names).isdisjoint(dataset.test.names)
    item, name = dataset.train[0], dataset.train.names[0]
    grey = np.asarray(Image.open(tmp_path / name))
    np.testing.assert_array_equal(item["image"], np.repeat(grey[..., None], 3, axis=-1))
    again = sources.load("elpv", str(tmp_path))
    assert again.test.names == dataset.test.names


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("images/cell0001.png 1.0", "line 3 is 'images/cell0001.png 1.0'; expected a file, a prob"),
        ("images/cell0001.png 1.0 moon", "expected a file, a probability and mono or poly"),
        ("images/cell0009.png 1.0 mono", "cell0009.png not found; install the package again"),
    ],
)
def test_damaged_labels_are_one_sentence(tmp_path, line, says):
    lines = write_elpv(tmp_path, {(0, "mono"): 2})
    (tmp_path / "labels.csv").write_text("\n".join([*lines, line]))
    refused(says, "elpv", tmp_path)


def test_what_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    refused("labels.csv not found; `pip install elpv-dataset` brings it", "elpv", tmp_path)
    refused("`apt-get install tuxpaint-stamps-default`", "tuxpaint_stamps", tmp_path / "none")
    refused("holds no folders with pictures", "tuxpaint_stamps", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("the package elpv-dataset not found; `pip install", "elpv")


def test_stamps_lie_at_any_depth(tmp_path):
    places = ("animals/a.png", "animals/birds/b.png", "food/c.png", "food/d.png")
    for i, place in enumerate((*places, "cartoon/tux/tux.png")):  # the last one of tuxpaint-data
        save(tmp_path / place, noise(i, 5, 4 + i, 4))
    (tmp_path / "animals" / "birds" / "b.txt").write_text("Bird")
    dataset = sources.load("tuxpaint_stamps", str(tmp_path))
    assert dataset.class_names == ("animals", "food")
    names = sorted([*dataset.train.names, *dataset.test.names])
    assert names == ["animals/a.png", "animals/birds/b.png", "food/c.png", "food/d.png"]
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1]
    assert dataset.train[0]["image"].shape[-1] == 3


def test_the_installed_solar_cells_are_as_documented():
    if importlib.util.find_spec("elpv_dataset") is None:
        pytest.skip("elpv-dataset is not installed")
    dataset = sources.load("elpv")
    assert (len(dataset.train), len(dataset.test)) == sources.SOURCES["elpv"].images == (1970, 654)
    assert np.bincount(dataset.train.labels).tolist() == [1131, 222, 80, 537]
    assert np.bincount(dataset.test.labels).tolist() == [377, 73, 26, 178]
    assert dataset.train[0]["image"].shape == (300, 300, 3) == dataset.native_size


def test_the_installed_stamps_are_as_documented():
    if not STAMPS_FROM.is_dir():
        pytest.skip("tuxpaint-stamps-default is not installed")
    dataset = sources.load("tuxpaint_stamps")
    images = sources.SOURCES["tuxpaint_stamps"].images
    assert (len(dataset.train), len(dataset.test)) == images == (596, 200)
    assert len(dataset.class_names) == 16
