"""Image files, IDX files and trees in the form that they have on disk: read, or refused."""

import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from PIL import Image
from source_helpers import folder_tree, noise, refused, refused_on_access, rows, save, write_idx

from kdgqa_jax.data import idx, images, sources
from kdgqa_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("no_network")
WNIDS = {
    "n02124075": "Egyptian cat",
    "n01443537": "goldfish, Carassius auratus",
    "n07749582": "lemon",
}


@pytest.fixture
def unprivileged():
    """A folder, and a function that makes a file unreadable for the rest of the test."""
    place = pathlib.Path(tempfile.mkdtemp(prefix="kdgqa_tests_"))
    place.chmod(0o755)

    def lock(path):
        path.chmod(0)
        if os.geteuid() == 0:  # root reads everything
            os.seteuid(65534)

    yield place, lock
    if os.getuid() == 0:
        os.seteuid(0)
    for path in place.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(place)


# --- The table ----------------------------------------------------------------------------------


def test_every_data_set_of_the_paper_has_a_row_that_fits_itself():
    expected = {
        "mnist": 10,
        "fashion_mnist": 10,
        "cifar10": 10,
        "cifar100": 100,
        "food101": 101,
        "imagenet2012": 1000,
        "oxford_iiit_pet": 37,
        "tiny_imagenet": 200,
        "cinic10": 10,
        "digits": 10,
        "elpv": 4,
        "tuxpaint_stamps": 16,
        "folder:PATH": None,
        "tfds:NAME": None,
    }
    assert {name: source.num_classes for name, source in sources.SOURCES.items()} == expected
    for name, source in sources.SOURCES.items():
        if isinstance(source.class_names, tuple):
            assert len(set(source.class_names)) == source.num_classes
        assert source.how_to(name, "/data") and "{" not in source.how_to(name, "/data")


def test_unknown_names_are_refused_with_the_nearest():
    refused("unknown data set 'cifar-10': did you mean 'cifar10'", "cifar-10")
    refused("did you mean 'tiny_imagenet'", "tinyimagenet")
    refused("did you mean 'folder:PATH'", "folder")
    refused("unknown data set 'digits:x'", "digits:x")
    refused("must have the form NAME, NAME:1.2.3", "tfds:../x", "/nowhere")
    refused("must have the form NAME, NAME:1.2.3", "tfds:", "/nowhere")
    for name, source in sources.SOURCES.items():
        if source.needs_dir:
            refused("needs a data directory (--data-dir DIR): ", name)


# --- MNIST --------------------------------------------------------------------------------------


def test_mnist_is_read_from_idx_files(tmp_path):
    for i, (prefix, count) in enumerate((("train", 12), ("t10k", 5))):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", noise(i, count, 28, 28))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    dataset = sources.load("mnist", str(tmp_path))
    assert dataset.class_names == tuple("0123456789") and dataset.native_size == (28, 28, 1)
    assert rows(dataset.train) == [
        (i % 10, x.tobytes()) for i, x in enumerate(noise(0, 12, 28, 28))
    ]
    assert rows(dataset.test) == [(i, x.tobytes()) for i, x in enumerate(noise(1, 5, 28, 28))]


def test_mnist_that_is_not_there_says_both_ways(tmp_path):
    text = refused("t10k-labels-idx1-ubyte.gz not found", "mnist", tmp_path)
    assert f"`kdgqa prepare --dataset mnist --data-dir {tmp_path}`" in text


def test_an_idx_file_without_permission_is_named(unprivileged):
    place, lock = unprivileged
    for file in idx.FILES:
        write_idx(place / file, noise(0, 2, 28, 28) if "images" in file else np.zeros(2))
    lock(place / idx.FILES[0])
    refused(f"{place / idx.FILES[0]} cannot be read (Permission denied)", "mnist", place)


# --- Tiny ImageNet ------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """A tree as tiny-imagenet-200.zip has it: 3 classes of 2 images, 4 images to validate on."""
    root = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        for i in range(2):
            save(
                root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", noise(10 * c + i, 64, 64, 3)
            )
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    lines = [f"{wnid}\t{words}" for wnid, words in WNIDS.items()]
    (root / "words.txt").write_text("\n".join(["n00001740\tentity", *lines]) + "\n")
    lines = []
    for i, wnid in enumerate(["n07749582", "n01443537", "n07749582", "n02124075"]):
        save(root / "val" / "images" / f"val_{i}.JPEG", noise(100 + i, 64, 64, 3))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("above", [True, False])
def test_tiny_imagenet_is_read_as_it_is_unpacked(tiny, above):
    dataset = sources.load("tiny_imagenet", str(tiny.parent if above else tiny))
    assert dataset.class_names == ("goldfish, Carassius auratus", "Egyptian cat", "lemon")
    assert dataset.native_size == dataset.image_shape == (64, 64, 3)
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    expected = [
        (label, np.asarray(Image.open(path)).tobytes())
        for label, wnid in enumerate(sorted(WNIDS))
        for path in sorted((tiny / "train" / wnid / "images").iterdir())
    ]
    assert rows(dataset.train) == expected
    expected = [np.asarray(Image.open(tiny / f"val/images/val_{i}.JPEG")) for i in range(4)]
    assert rows(dataset.test) == [
        (label, x.tobytes()) for label, x in zip([2, 0, 2, 1], expected, strict=True)
    ]


def _unlisted_class(tiny):
    with open(tiny / "val" / "val_annotations.txt", "a") as file:
        file.write("val_3.JPEG\tn09999999\t0\t0\t1\t1\n")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: (t / "wnids.txt").unlink(), "tiny-imagenet-200.zip and unpack it in"),
        (lambda t: (t / "wnids.txt").write_text("\n"), "wnids.txt names no classes"),
        (lambda t: (t / "words.txt").unlink(), "words.txt cannot be read (No such file"),
        (lambda t: (t / "words.txt").write_bytes(b"\xff\t\xff"), "words.txt cannot be read (not U"),
        (lambda t: (t / "words.txt").write_text(""), "words.txt has no line for n01443537"),
        (lambda t: shutil.rmtree(t / "train/n07749582"), "train/n07749582/images cannot be listed"),
        (lambda t: (t / "val/val_annotations.txt").unlink(), "val_annotations.txt cannot be read"),
        (lambda t: (t / "val/images/val_2.JPEG").unlink(), "val_2.JPEG not found"),
        (_unlisted_class, "val_annotations.txt: line 5: class 'n09999999' is not in wnids.txt"),
    ],
)
def test_damaged_tiny_imagenet_is_refused(tiny, damage, says):
    damage(tiny)
    refused(says, "tiny_imagenet", tiny.parent)


# --- CINIC-10 -----------------------------------------------------------------------------------


@pytest.fixture
def cinic(tmp_path):
    """A tree as CINIC-10.tar.gz has it, with 2, 1 and 1 images a class."""
    for c, name in enumerate(sources.SOURCES["cinic10"].class_names):
        for i, split in enumerate(["train", "train", "valid", "test"]):
            save(tmp_path / split / name / f"cifar10-{split}-{i}.png", noise(10 * c + i, 32, 32, 3))
    return tmp_path


def test_cinic10_is_read_as_it_is_unpacked(cinic):
    dataset = sources.load("cinic10", str(cinic))
    assert dataset.class_names[:2] == ("airplane", "automobile")
    train = [(c, noise(10 * c + i, 32, 32, 3).tobytes()) for c in range(10) for i in range(2)]
    test = [(c, noise(10 * c + 3, 32, 32, 3).tobytes()) for c in range(10)]
    assert rows(dataset.train) == train and rows(dataset.test) == test


def test_damaged_cinic10_is_refused(cinic, tmp_path):
    refused("CINIC-10/train not found; download CINIC-10.tar.gz", "cinic10", tmp_path / "nowhere")
    (cinic / "test/zebra").mkdir()
    refused("test/zebra: 'zebra' is not a class of CINIC-10", "cinic10", cinic)
    (cinic / "test/zebra").rmdir()
    shutil.rmtree(cinic / "train/frog")
    refused("train/frog not found", "cinic10", cinic)
    (cinic / "train/frog").mkdir()
    refused("train/frog holds no images", "cinic10", cinic)


# --- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("test_split", ["val", "test"])
def test_a_folder_with_splits_is_read_as_split(tmp_path, test_split):
    folder_tree(tmp_path / "train")
    folder_tree(tmp_path / test_split, count=1)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    dataset = sources.load(f"folder:{tmp_path}")
    assert dataset.class_names == ("ant", "bee") and dataset.native_size is None
    expected = [(c, noise(100 * c + i, 4 + c, 5 + i, 3)) for c in range(2) for i in range(3)]
    assert rows(dataset.train) == [(c, x.tobytes()) for c, x in expected]
    assert [x["image"].shape for x in dataset.train] == [x.shape for _, x in expected]
    assert rows(dataset.test) == [(c, x.tobytes()) for c, x in expected[::3]]


def test_val_is_taken_before_test(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        folder_tree(tmp_path / split, count=count)
    assert len(sources.load(f"folder:{tmp_path}").test) == 4


def test_a_folder_without_splits_is_split_by_class_and_always_the_same(tmp_path):
    folder_tree(tmp_path, ("ant", "bee", "cow"), count=20)
    folder_tree(tmp_path, ("dog",), count=2)
    dataset = sources.load(f"folder:{tmp_path}")
    train, test = rows(dataset.train), rows(dataset.test)
    assert np.bincount([c for c, _ in train]).tolist() == [18, 18, 18, 1]
    assert np.bincount([c for c, _ in test]).tolist() == [2, 2, 2, 1]
    everything = {
        (c, noise(100 * c + i, 4 + c, 5 + i, 3).tobytes()) for c in range(3) for i in range(20)
    }
    everything |= {(3, noise(i, 4, 5 + i, 3).tobytes()) for i in range(2)}
    assert set(train) | set(test) == everything and len(train) + len(test) == 62
    again = sources.load(f"folder:{tmp_path}")
    assert again.test.names == dataset.test.names
    assert dataset.test.names[:2] != ["ant/000.png", "ant/001.png"]  # drawn, not the first ones


def test_files_of_all_modes_become_upright_rgb(tmp_path):
    rgb = noise(0, 6, 9, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter
    files = {
        "a_jpeg.jpg": (Image.fromarray(rgb), {"exif": turned, "quality": 90}),
        "b_grey.png": (Image.fromarray(rgb[..., 0]), {}),
        "c_alpha.png": (Image.fromarray(np.dstack([rgb, rgb[..., :1]])), {}),
        "d_palette.gif": (Image.fromarray(rgb).quantize(16), {}),
        "e_16bit.png": (Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), {}),
        "f_cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {}),
    }
    for split in ("train", "val"):
        (tmp_path / split / "all").mkdir(parents=True)
        for name, (image, options) in files.items():
            image.save(tmp_path / split / "all" / name, **options)
    found = [x["image"] for x in sources.load(f"folder:{tmp_path}").train]
    expected = []
    for name in files:
        with Image.open(tmp_path / "train/all" / name) as image:
            expected.append(np.asarray(image.convert("RGB")))
    expected[0] = np.rot90(expected[0], -1)
    expected[4] = expected[1] = np.dstack([rgb[..., 0]] * 3)
    expected[2] = rgb
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_cut_jpeg_files_are_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    save(path, noise(0, 40, 40, 3))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"cut.jpg: not an image that can be read \(.*truncated"):
        images.opened(path, path)


def test_folders_that_hold_no_classes_are_refused(tmp_path):
    refused("'folder:' needs a path", "folder:")
    refused(f"{tmp_path / 'nowhere'} cannot be listed (No such file", f"folder:{tmp_path}/nowhere")
    refused("holds no folders; expected one per class", f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    refused("neither val nor test found beside train", f"folder:{tmp_path}")
    (tmp_path / "val").mkdir()
    refused("train holds no folders", f"folder:{tmp_path}")
    folder_tree(tmp_path / "train")
    refused("val/ant not found", f"folder:{tmp_path}")
    folder_tree(tmp_path / "val", ("ant", "bee", "cow"))
    refused("val/cow: 'cow' is not a class of", f"folder:{tmp_path}")
    shutil.rmtree(tmp_path / "val/cow")
    shutil.rmtree(tmp_path / "val/bee")
    (tmp_path / "val/bee").mkdir()
    refused("val/bee holds no images (.jpg, ", f"folder:{tmp_path}")
    folder_tree(tmp_path / "single", count=1)
    refused("single/ant holds one image; expected at least two", f"folder:{tmp_path}/single")


def test_a_damaged_image_is_named_when_it_is_asked_for(tmp_path):
    folder_tree(tmp_path / "train", count=4)
    folder_tree(tmp_path / "val", count=1)
    ant = tmp_path / "train/ant"
    save(ant / "000.png", noise(0, 40, 40, 3))
    (ant / "000.png").write_bytes((ant / "000.png").read_bytes()[:-2000])
    (ant / "001.png").write_bytes(b"hello")
    split = sources.load(f"folder:{tmp_path}").train
    (ant / "002.png").unlink()
    refused_on_access(split, 0, f"{ant / '000.png'}: not an image that can be read (")
    refused_on_access(
        split, 1, f"{ant / '001.png'}: not an image that can be read (of no known format)"
    )
    refused_on_access(split, 2, f"{ant / '002.png'}: not an image that can be read (No such file")
    assert split[3]["image"].shape == (4, 8, 3)


def test_files_and_folders_without_permission_are_named(unprivileged):
    place, lock = unprivileged
    folder_tree(place / "train")
    folder_tree(place / "val")
    split = sources.load(f"folder:{place}").train
    lock(place / "train/ant/000.png")
    refused_on_access(
        split, 0, f"{place / 'train/ant/000.png'}: not an image that can be read (Permission"
    )


def test_a_class_folder_without_permission_is_named(unprivileged):
    place, lock = unprivileged
    folder_tree(place)
    lock(place / "bee")
    refused(f"{place / 'bee'} cannot be listed (Permission denied)", f"folder:{place}")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tiny_imagenet", "cinic10"])
def test_a_data_directory_without_permission_is_named(unprivileged, name):
    place, lock = unprivileged
    (place / "data" / name).mkdir(parents=True)
    lock(place / "data")
    refused(f"{place / 'data'}", name, place / "data")
    assert "Permission denied" in refused("cannot be read (", name, place / "data")
