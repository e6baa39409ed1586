"""Data sets that tensorflow-datasets has prepared: read without TensorFlow, refused, prepared."""

import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
from source_helpers import folder_tree, noise, refused, refused_on_access, rows, write_idx

from kdgqa_jax import cli
from kdgqa_jax.data import idx, pipeline, sources, tfds_source
from kdgqa_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("no_network")
FIXTURES = pathlib.Path(__file__).parent / "fixtures"


# --- tensorflow-datasets ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data directory as tfds leaves it; see fixtures/make_tfds.py."""
    place = tmp_path_factory.mktemp("tfds")
    for archive in (FIXTURES / "tfds").glob("*.zip"):
        zipfile.ZipFile(archive).extractall(place)
    return place


@pytest.fixture
def own(prepared, tmp_path):
    """A copy to damage."""
    return shutil.copytree(prepared, tmp_path / "tfds")


def cifar_rows(start, stop):
    images = noise(0, 30, 4, 4, 3).repeat(8, axis=1).repeat(8, axis=2)
    return {(i % 10, images[i].tobytes()) for i in range(start, stop)}


@pytest.mark.parametrize("name", ["cifar10", "tfds:cifar10", "tfds:cifar10:3.0.2"])
def test_cifar10_is_read_from_array_records(prepared, name):
    dataset = sources.load(name, str(prepared))
    assert dataset.name == name and dataset.native_size == dataset.image_shape == (32, 32, 3)
    assert dataset.class_names == sources.SOURCES["cifar10"].class_names
    assert (len(dataset.train), len(dataset.test)) == (20, 10)
    assert set(rows(dataset.train)) == cifar_rows(0, 20)
    assert set(rows(dataset.test)) == cifar_rows(20, 30)
    np.testing.assert_array_equal(dataset.test[-1]["image"], dataset.test[9]["image"])


@pytest.mark.parametrize("name", ["food101", "tfds:food101"])
def test_images_that_vary_are_read_from_array_records(prepared, name):
    dataset = sources.load(name, str(prepared))
    assert dataset.native_size is None and len(dataset.class_names) == 101
    assert dataset.class_names[100] == "dish_100"
    seen = {}
    for split, indices in ((dataset.train, range(6)), (dataset.test, range(6, 10))):
        assert sorted(int(x["label"]) for x in split) == [10 * i for i in indices]
        seen |= {int(x["label"]) // 10: x["image"] for x in split}
    for i, image in seen.items():
        assert image.shape == (20 + i, 30 + 2 * i, 3) and image.dtype == np.uint8
        red, blue = np.full(30 + 2 * i, 10 * i), 3 * np.arange(30 + 2 * i)
        expected = np.stack([red, 0 * red, blue], axis=-1)
        if i == 1:  # grey by the weights of ITU-R 601
            expected = np.stack([0.299 * red + 0.114 * blue] * 3, axis=-1)
        error = np.abs(image.astype(float) - expected)
        assert error.max() < 12 and error.mean() < 2.5, i  # JPEG


def test_pets_are_read_past_their_masks_and_boxes(prepared):
    dataset = sources.load("oxford_iiit_pet", str(prepared))
    assert (len(dataset.train), len(dataset.test), len(dataset.class_names)) == (3, 2, 37)
    expected = {(7 * i, bytes([i]) * ((5 + i) * 6 * 3)) for i in range(5)}
    assert set(rows(dataset.train) + rows(dataset.test)) == expected


def test_the_newest_version_is_read_unless_one_is_named(own):
    shutil.copytree(own / "cifar10/3.0.2", own / "cifar10/3.0.10")
    shutil.copytree(own / "cifar10/3.0.2", own / "cifar10/incomplete.X_4.0.0")
    found = tfds_source.find("cifar10", str(own))
    assert found.name == "3.0.10"
    assert tfds_source.find("cifar10:3.0.2", str(own)).name == "3.0.2"
    assert tfds_source.find("cifar10:4.0.0", str(own)) is None


def test_configs_are_found_and_asked_for(own):
    shutil.copytree(own / "cifar10/3.0.2", own / "birds/small/1.0.0")
    assert tfds_source.find("birds", str(own)) == own / "birds/small/1.0.0"
    shutil.copytree(own / "cifar10/3.0.2", own / "birds/large/1.0.0")
    refused("name one of them: birds/large, birds/small", "tfds:birds", own)
    assert len(sources.load("tfds:birds/large", str(own)).test) == 10


def test_mnist_is_read_from_array_records_where_no_idx_files_lie(own):
    (own / "cifar10").rename(own / "mnist")  # the name in dataset_info.json stays
    assert len(sources.load("mnist", str(own)).test) == 10
    write_idx(own / idx.FILES[0], noise(0, 2, 28, 28))
    refused("train-labels-idx1-ubyte.gz", "mnist", own)


@pytest.mark.parametrize("name", ["cifar100", "imagenet2012", "tfds:cars196", "cifar10"])
def test_a_data_set_that_is_not_prepared_gives_the_command(tmp_path, name):
    command = f"`kdgqa prepare --dataset {name} --data-dir {tmp_path}`"
    refused(command, name, tmp_path)
    refused(f"{tmp_path}/nowhere", name, tmp_path / "nowhere")


def _edit(file, old, new):
    def damage(folder):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return damage


def _shard(folder, split):
    return folder / f"cifar10-{split}.array_record-00000-of-00001"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: _shard(f, "test").unlink(),
            "cifar10-test.array_record-00000-of-00001 not found",
        ),
        (lambda f: (f / "features.json").unlink(), "is not a prepared tfds data set"),
        (lambda f: (f / "dataset_info.json").write_text("{"), "is not a prepared tfds data set"),
        (_edit("dataset_info.json", '"array_record"', '"tfrecord"'), "is prepared as tfrecord"),
        (_edit("dataset_info.json", '"test"', '"extra"'), "has no split 'test', only train, extra"),
        (_edit("features.json", '"10"', '"9"'), "holds 9 classes where cifar10 has 10"),
        (_edit("features.json", '"uint8"', '"uint16"'), "images are uint16"),
        (
            _edit("features.json", '"image": {\n                "image"', '"photo": {\n "image"'),
            "hol",
        ),
    ],
)
def test_a_damaged_prepared_directory_is_refused(own, damage, says):
    damage(own / "cifar10/3.0.2")
    text = refused(says, "cifar10", own)
    assert str(own / "cifar10/3.0.2") in text


def test_a_set_without_test_split_is_refused(own):
    _edit("dataset_info.json", '"test"', '"extra"')(own / "cifar10/3.0.2")
    refused("has the splits train, extra; expected train, and one of", "tfds:cifar10", own)


def _hole(data):
    data[200:1200] = bytes(1000)


def _cut(data):
    del data[-70000:]


def _empty(data):
    data.clear()


@pytest.mark.parametrize("damage", [_hole, _cut, _empty])
def test_a_damaged_record_names_its_file_when_it_is_asked_for(own, damage):
    path = _shard(own / "cifar10/3.0.2", "train")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    dataset = sources.load("cifar10", str(own))
    refused_on_access(dataset.train, 2, f"{path}: record 2 of split 'train' cannot be read (")
    assert len(rows(dataset.test)) == 10


def test_a_missing_record_is_named_and_the_end_is_the_end(own):
    _edit("dataset_info.json", '"20"', '"21"')(own / "cifar10/3.0.2")
    split = sources.load("cifar10", str(own)).train
    refused_on_access(
        split, 20, "cifar10-train.array_record-00000-of-00001: record 20 of split 'train'"
    )
    with pytest.raises(IndexError):
        split[21]


def test_a_label_out_of_range_is_named_when_it_is_asked_for(own):
    _edit("features.json", '"10"', '"5"')(own / "cifar10/3.0.2")
    split = sources.load("tfds:cifar10", str(own)).train
    with pytest.raises(
        UserError, match=r"record \d+ of split 'train': label [5-9] is out of range"
    ):
        list(split)


def test_splits_survive_pickling_and_feed_the_pipeline(prepared, tmp_path):
    folder_tree(tmp_path)
    for name, place in (("cifar10", prepared), (f"folder:{tmp_path}", None), ("digits", None)):
        dataset = sources.load(name, place and str(place), shift="negative")
        for split in (dataset.train, dataset.test):
            assert rows(pickle.loads(pickle.dumps(split))) == rows(split)
    plain, turned = (
        sources.load("cifar10", str(prepared), shift).test for shift in ("none", "quarter_turn")
    )
    np.testing.assert_array_equal(turned[3]["image"], np.rot90(plain[3]["image"]))
    batches = pipeline.TrainBatches(plain, 5, seed=0)
    seen = [next(batches) for _ in range(2)]
    assert {
        (int(c), x.tobytes()) for b in seen for c, x in zip(b["label"], b["image"], strict=True)
    } == cifar_rows(20, 30)


def test_reading_imports_no_tensorflow_and_opens_no_socket(prepared, tmp_path):
    """In a fresh process, with a package called tensorflow at hand."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    code = """
import socket, sys
def connect(*_):
    raise SystemExit("a socket was opened")
socket.socket.connect = socket.getaddrinfo = connect
from kdgqa_jax.data import sources
assert "tensorflow_datasets" not in sys.modules
for name in ("cifar10", "food101", "tfds:cifar10"):
    dataset = sources.load(name, sys.argv[1])
    print(sum(x["image"].size for split in (dataset.train, dataset.test) for x in split))
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    path = os.pathsep.join([str(tmp_path), str(FIXTURES.parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", code, str(prepared)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == str(30 * 32 * 32 * 3)


# --- kdgqa prepare ------------------------------------------------------------------------------


def prepare(capsys, name, data_dir=""):
    """What `kdgqa prepare` says, and its exit status."""
    status = cli.main(["prepare", "--dataset", name, "--data-dir", str(data_dir)])
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("\n") == 1
    return status, shown.out + shown.err


def test_prepare_counts_what_is_there(capsys, prepared, tmp_path):
    expected = (0, "cifar10: 20 images to train on, 10 to test on, 10 classes\n")
    assert prepare(capsys, "cifar10", prepared) == expected
    folder_tree(tmp_path, count=20)
    name = f"folder:{tmp_path}"
    expected = (0, f"{name}: 36 images to train on, 4 to test on, 2 classes\n")
    assert prepare(capsys, name) == expected
    assert prepare(capsys, "digits")[1].startswith("digits: 1,437 images")


def test_prepare_says_what_to_put_where(capsys, tmp_path):
    for name, says in (
        ("tiny_imagenet", f"tiny-imagenet-200.zip and unpack it in {tmp_path},"),
        (
            "cinic10",
            "CINIC-10.tar.gz from https://datashare.ed.ac.uk/handle/10283/3192 and unpack",
        ),
        ("imagenet2012", f"put {' and '.join(sources.SOURCES['imagenet2012'].manual_files)} into"),
        ("cifar-10", "did you mean 'cifar10'"),
    ):
        status, text = prepare(capsys, name, tmp_path)
        assert status == 1 and says in text
    assert prepare(capsys, "cifar10")[1].startswith(
        "kdgqa prepare: data set 'cifar10' needs a data directory (--data-dir DIR)"
    )


def test_prepare_without_tensorflow_names_the_extra(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in ("cifar10", "mnist", "tfds:cars196"):
        status, text = prepare(capsys, name, tmp_path)
        assert status == 1 and 'pip install "kdgqa-jax[prepare]"' in text


@pytest.fixture
def fake_tfds(monkeypatch, prepared):
    """tfds with a builder that does what a test sets, as though TensorFlow were there."""
    import tensorflow_datasets as tfds

    asked = types.SimpleNamespace(manual=None, outcome=None, arguments=None)

    class Builder:
        def __init__(self):
            self.MANUAL_DOWNLOAD_INSTRUCTIONS = asked.manual

        def download_and_prepare(self, download_config):
            assert not download_config.try_download_gcs
            if isinstance(asked.outcome, Exception):
                raise asked.outcome
            shutil.copytree(prepared / "cifar10", asked.outcome)

    def builder(name, **arguments):
        if name == "cars":
            raise tfds.core.DatasetNotFoundError("many\nlines")
        asked.name, asked.arguments = name, arguments
        return Builder()

    monkeypatch.setattr(tfds, "builder", builder)
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    return asked


def test_prepare_prepares_array_records_once(capsys, tmp_path, fake_tfds):
    fake_tfds.outcome = tmp_path / "cifar10"
    assert prepare(capsys, "cifar10", tmp_path)[0] == 0
    assert fake_tfds.name == "cifar10"
    assert fake_tfds.arguments == {
        "data_dir": str(tmp_path),
        "file_format": "array_record",
        "try_gcs": False,
    }
    fake_tfds.outcome = RuntimeError("prepared twice")
    assert prepare(capsys, "cifar10", tmp_path)[0] == 0


def test_prepare_that_fails_is_one_sentence(capsys, tmp_path, fake_tfds):
    status, text = prepare(capsys, "tfds:cars", tmp_path)
    assert (
        status == 1 and "tensorflow-datasets has no data set 'cars'; did you mean 'cars196'" in text
    )
    fake_tfds.outcome = ConnectionError("Max retries exceeded\nwith url: /cifar-10-binary.tar.gz")
    status, text = prepare(capsys, "cifar10", tmp_path)
    assert status == 1 and "(Max retries exceeded with url: /cifar-10-binary.tar.gz)" in text
    fake_tfds.outcome = OSError(28, "No space left on device")
    assert "(No space left on device)" in prepare(capsys, "cifar10", tmp_path)[1]
    fake_tfds.manual = "Get it from\n  https://example.org."
    status, text = prepare(capsys, "tfds:cars196", tmp_path)
    assert status == 1 and f"{tmp_path}/downloads/manual: Get it from https://example.org." in text
