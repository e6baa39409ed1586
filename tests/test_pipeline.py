"""Batches: every image once an epoch, the same whatever reads them, exactly resumable."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from kdgqa_jax import sharding
from kdgqa_jax.config import train_config
from kdgqa_jax.data import images, pipeline, sources
from kdgqa_jax.errors import UserError


def numbered(count):
    """Image i holds the pixels i, i + 1, ...; its label is i."""
    labels = np.arange(count, dtype=np.int32)
    pixels = (labels[:, None] + np.arange(12)).astype(np.uint8).reshape(count, 2, 2, 3)
    return sources.ArraySplit(pixels, labels)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes()


def test_training_sees_every_image_once_an_epoch_in_another_order():
    batches = pipeline.TrainBatches(numbered(10), batch_size=4, seed=3)
    labels = np.concatenate([batch["label"] for batch in take(batches, 10)])
    epochs = labels.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    again = pipeline.TrainBatches(numbered(10), batch_size=4, seed=3)
    other = pipeline.TrainBatches(numbered(10), batch_size=4, seed=4)
    assert next(again)["label"].tolist() == labels[:4].tolist()
    assert np.concatenate([b["label"] for b in take(other, 3)]).tolist() != labels[:12].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_iterator_resumes_in_mid_epoch(workers):
    """Stopped after 3 batches of 4 in epochs of 10: the bytes are those of an unbroken run."""
    whole = take(pipeline.TrainBatches(numbered(10), batch_size=4, seed=0), 8)
    first = pipeline.TrainBatches(numbered(10), 4, 0, workers)
    seen = take(first, 3)
    resumed = pipeline.TrainBatches(numbered(10), 4, 0, workers)
    resumed.set_state(first.get_state())
    assert_same([*seen, *take(resumed, 5)], whole)


def test_workers_and_on_device_give_the_same_batches():
    mesh, split = sharding.make_mesh(), numbered(50)
    expected = take(pipeline.TrainBatches(split, 8, 5), 9)
    for workers, on_device in ((0, False), (2, False), (0, True)):
        batches, fetch = pipeline.train_source(split, 8, 5, mesh, workers, on_device)
        assert_same([jax.device_get(fetch(batch)) for batch in take(batches, 9)], expected)


def test_on_device_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(pipeline, "ON_DEVICE_LIMIT", 599)
    with pytest.raises(UserError, match=r"data.on_device: 50 images need .* leave the data"):
        pipeline.train_source(numbered(50), 8, 5, sharding.make_mesh(), on_device=True)


def test_two_processes_share_the_batches_of_one(monkeypatch):
    """One process with batches of 8 and two with 4 each see the same set of images per step."""
    whole = take(pipeline.TrainBatches(numbered(21), 8, 1), 7)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    parts = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(take(pipeline.TrainBatches(numbered(21), 8, 1), 7))
    for one, first, second in zip(whole, *parts, strict=True):
        assert len(first["label"]) == len(second["label"]) == 4
        both = sorted([*first["label"].tolist(), *second["label"].tolist()])
        assert both == sorted(one["label"].tolist())


def test_evaluation_sees_every_image_once_and_masks_the_padding():
    batches = list(pipeline.eval_batches(numbered(10), batch_size=4))
    assert [batch["label"].shape for batch in batches] == [(4,)] * 3
    assert [batch["mask"].tolist() for batch in batches[1:]] == [
        [True] * 4,
        [True, True, False, False],
    ]
    labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert labels.tolist() == list(range(10))


def test_images_of_many_sizes_get_one():
    rng = np.random.default_rng(0)
    shapes = [(9, 14, 3), (20, 7, 3), (8, 6, 3)]
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]

    class Split(list):
        def __getitem__(self, i):
            return {"image": pictures[i], "label": np.int32(i)}

    crop = images.Preprocessing(resize="shorter_side", interpolation="bicubic")
    for preprocessing in (images.Preprocessing(), crop):
        prepared = pipeline.Prepared(Split(pictures), (8, 6), preprocessing)
        for i, picture in enumerate(pictures):
            expected = preprocessing.resized(Image.fromarray(picture), (8, 6))
            np.testing.assert_array_equal(prepared[i]["image"], np.asarray(expected))
    assert prepared[2]["image"] is pictures[2]  # of the right size already


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A split of which some images cannot be read."""

    count: int
    bad: tuple[int, ...]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise UserError(f"image{i}.png: truncated")
        return numbered(self.count)[i]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_stops_the_run_by_default(workers):
    prepared = pipeline.Prepared(Damaged(10, (3,)), (2, 2))
    batches = pipeline.TrainBatches(prepared, 5, 0, workers)
    with pytest.raises(Exception, match=r"image3\.png: truncated"):
        take(batches, 2)


def test_images_that_cannot_be_read_are_counted_and_replaced():
    prepared = pipeline.Prepared(Damaged(10, (3, 4, 9)), (2, 2), skip_corrupt=True)
    taken = take(pipeline.TrainBatches(prepared, 5, 0), 2)
    assert sum(batch["corrupt"].sum() for batch in taken) == 3
    labels = sorted(np.concatenate([batch["label"] for batch in taken]).tolist())
    assert labels == [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]  # the next one that can be read
    (batch,) = pipeline.eval_batches(prepared, 10)
    assert batch["mask"].tolist() == [i not in (3, 4, 9) for i in range(10)]
    assert "corrupt" not in batch
    with pytest.raises(UserError, match="no image of the split"):
        pipeline.Prepared(Damaged(2, (0, 1)), (2, 2), skip_corrupt=True)[0]


@pytest.mark.parametrize("native_size", [None, (2, 2, 3)])
def test_the_shape_is_that_of_the_first_image_that_can_be_read(native_size):
    """Or what is known of all of them; a run that skips what it cannot read starts."""
    test = numbered(3)
    dataset = sources.Dataset("x", ("a",), Damaged(4, (0, 1)), test, native_size)
    assert dataset.image_shape == (2, 2, 3)
    config = train_config()
    config.data.skip_corrupt = True
    prepared = pipeline.prepare(dataset, (2, 2), config.data)
    (batch,) = take(pipeline.TrainBatches(prepared.train, 4, 0), 1)
    assert sorted(batch["label"].tolist()) == [2, 2, 2, 3] and batch["corrupt"].sum() == 2
    hopeless = sources.Dataset("x", ("a",), Damaged(2, (0, 1)), test, None)
    with pytest.raises(UserError, match=r"none of the 2 images of x can be read; the first: i"):
        pipeline.prepare(hopeless, (2, 2), config.data)


def test_workers_end_when_the_run_is_killed(tmp_path):
    """SIGKILL, which leaves nobody to end them."""
    script = tmp_path / "run.py"
    script.write_text(
        "import multiprocessing, time\n"
        "import test_pipeline\n"
        "from kdgqa_jax.data import pipeline\n"
        "if __name__ == '__main__':\n"
        "    batches = pipeline.TrainBatches(test_pipeline.numbered(10), 4, 0, workers=2)\n"
        "    next(batches), next(batches)\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        run.kill()
        killed = time.monotonic()
        while any(map(alive, workers)) and time.monotonic() - killed < 60:
            time.sleep(0.05)
        took = time.monotonic() - killed
    for pid in filter(alive, workers):
        os.kill(pid, signal.SIGKILL)
    assert took < 10


def alive(pid):
    """A process that is there, and not only because nobody has asked for its exit status."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_statistics_must_fit_the_channels():
    config = train_config()
    config.data.mean = (0.1, 0.2, 0.3)
    with pytest.raises(UserError, match=r"data\.mean=.* has 3 numbers; expected one, or one for"):
        pipeline.prepare(sources.load("digits"), (8, 8), config.data)
