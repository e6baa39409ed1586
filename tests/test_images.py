"""Image files of any mode, size and place, and how they are resized."""

import os
import resource
import zlib

import helpers
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from source_helpers import noise, save

from kdgqa_jax.convert import CalibrationImages
from kdgqa_jax.data import images, modes, sources
from kdgqa_jax.errors import UserError

PLAIN = images.Preprocessing(interpolation="nearest")
RGB = noise(0, 12, 16, 3)
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def stored(folder, image, name, **options):
    """What `opened` makes of an image that was saved: RGB pixels."""
    path = folder / name
    image.save(path, **options)
    return images.to_array(images.opened(path, path))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- Modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (GREY.astype(np.int32), GREY),  # of 8 bits, in 32
        (GREY.astype(np.int32) * 257, GREY),  # of 16 bits, in 32
        (GREY.astype(np.uint16) * 257, GREY),
        (GREY.astype(np.uint16), GREY >> 8),  # 16 bits that are dark stay dark
        (GREY.astype(np.float32) / 255, GREY),
        (GREY.astype(np.float32), GREY),
    ],
    ids=["8 in int32", "16 in int32", "16", "dark 16", "floats to 1", "floats to 255"],
)
def test_more_than_8_bits_are_scaled(tmp_path, pixels, expected):
    found = stored(tmp_path, Image.fromarray(pixels), "x.tif")
    np.testing.assert_array_equal(found, np.dstack([expected] * 3))


def test_12_bits_are_scaled(tmp_path):
    """A TIFF of 12 bits per sample, two samples in three bytes, written by hand."""
    values = (np.arange(16, dtype=np.uint16) * 273).reshape(2, 8)  # 0 to 4095
    pairs = values.reshape(-1, 2)
    packed = np.stack(
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1
    ).astype(np.uint8)
    tags = [(256, 8), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2)]
    tags.append((279, packed.size))
    data = packed.tobytes()
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags:
        directory += b"".join(n.to_bytes(s, "little") for n, s in ((tag, 2), (4, 2), (1, 4)))
        directory += value.to_bytes(4, "little")
    offset = (8 + len(data)).to_bytes(4, "little")
    (tmp_path / "x.tif").write_bytes(b"II*\0" + offset + data + directory + bytes(4))
    found = images.to_array(images.opened(tmp_path / "x.tif", "x.tif"))
    np.testing.assert_array_equal(found[..., 0], values >> 4)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (np.int32([[0, 65536]]), "mode I: 32-bit integers from 0 to 65536; expected 0 to 255 or"),
        (np.int32([[-1, 5]]), "mode I: 32-bit integers from -1 to 5; expected"),
        (np.float32([[0, np.nan]]), "mode F: floats from nan to nan; expected 0 to 1 or 0 to 255"),
        (np.float32([[0, np.inf]]), "mode F: floats from 0 to inf"),
        (np.float32([[-1, 1]]), "mode F: floats from -1 to 1"),
        (np.float32([[0, 65535]]), "mode F: floats from 0 to 65535"),
    ],
)
def test_values_of_no_known_range_are_refused(tmp_path, pixels, says):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=rf"x\.tif: not an image that can be read \({says}"):
        images.read(tmp_path / "x.tif", (2, 2), 3, PLAIN)


def lab_of(rgb):
    """CIE L*a*b* of sRGB in 0..1, by its definition, with the D50 white of ICC profiles."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]]
    ratios = linear @ np.transpose(to_xyz) / [0.9642, 1.0, 0.8249]
    f = np.where(ratios > (6 / 29) ** 3, np.cbrt(ratios), ratios / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def test_lab_becomes_srgb(tmp_path):
    lab = lab_of(RGB / 255.0)
    as_bytes = np.stack([lab[..., 0] * 2.55, lab[..., 1], lab[..., 2]], -1).round()
    encoded = as_bytes.astype(np.int16).astype(np.uint8)  # a and b are signed
    image = Image.frombytes("LAB", (16, 12), encoded.tobytes())
    found = stored(tmp_path, image, "x.tif")
    with Image.open(tmp_path / "x.tif") as again:
        assert again.mode == "LAB"
    assert np.linalg.norm(lab_of(found / 255.0) - lab, axis=-1).max() < 2  # as eyes see it
    grey = images.read(tmp_path / "x.tif", (12, 16), 1, PLAIN)[..., 0].astype(int)
    assert np.abs(grey - np.asarray(Image.fromarray(found).convert("L"))).max() == 0


def test_modes_that_pil_has_of_its_own():
    """Premultiplied, palettes with transparency, and those that no file has."""
    image, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    palette = image.quantize(16)
    for mode, made, meant in (
        ("RGBa", image.convert("RGBA").convert("RGBa"), image),
        ("RGBX", image.convert("RGBX"), image),
        ("La", grey.convert("LA").convert("La"), grey),
        ("LA", grey.convert("LA"), grey),
        ("PA", palette.convert("PA"), palette),
        ("HSV", image.convert("HSV"), image),
        ("CMYK", image.convert("CMYK"), image),
    ):
        assert made.mode == mode
        found = np.asarray(modes.converted(made, 3), int)
        assert np.abs(found - np.asarray(meant.convert("RGB"), int)).max() <= 8, mode
        assert modes.converted(made, 1).mode == "L"


# --- EXIF ---------------------------------------------------------------------------------------


def naive_turn(pixels, orientation):
    """As the standard has it: where the first row and the first column are to be seen."""
    flipped = {2: pixels[:, ::-1], 4: pixels[::-1]}.get(orientation)
    if flipped is not None:
        return flipped
    quarter = {3: 2, 6: -1, 8: 1}.get(orientation)
    if quarter is not None:
        return np.rot90(pixels, quarter)
    if orientation in (5, 7):
        across = pixels.transpose(1, 0, 2)
        return across if orientation == 5 else across[::-1, ::-1]
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_ways_to_read_a_file_turn_it_as_its_exif_data_says(tmp_path, orientation):
    """Data sets and their calibration, files of predictions and folders of calibration."""
    expected = naive_turn(RGB, orientation)
    shape = expected.shape[:2]
    for split in ("train", "val"):
        save(tmp_path / split / "all" / "x.png", RGB, exif=turned(orientation))
    split = sources.load(f"folder:{tmp_path}").train
    np.testing.assert_array_equal(split[0]["image"], expected)
    np.testing.assert_array_equal(np.asarray(split.open(0)[0]), expected)
    file = tmp_path / "train/all/x.png"
    np.testing.assert_array_equal(images.read(file, shape, 3, PLAIN), expected)
    for place in (f"folder:{tmp_path}", str(tmp_path / "train")):
        calibrating = CalibrationImages(place, count=1).read(shape, 3, PLAIN)
        np.testing.assert_array_equal(calibrating[0], PLAIN.normalise(expected))


def test_other_modes_are_turned_too(tmp_path):
    for name, pixels in (("a.png", GREY.astype(np.uint16) * 257), ("b.tif", GREY.astype("f4"))):
        found = stored(tmp_path, Image.fromarray(pixels), name, exif=turned(6))
        np.testing.assert_array_equal(found[..., 0], np.rot90(GREY, -1))


# --- Sizes --------------------------------------------------------------------------------------


def test_resize_and_crop():
    image = Image.fromarray(np.arange(20 * 40, dtype=np.uint32).astype(np.uint8).reshape(20, 40))
    crop = images.Preprocessing(resize="shorter_side", crop_share=0.5, interpolation="bicubic")
    expected = image.resize((32, 16), Image.Resampling.BICUBIC).crop((12, 4, 20, 12))
    np.testing.assert_array_equal(np.asarray(crop.resized(image, (8, 8))), np.asarray(expected))
    squash = images.Preprocessing(crop_share=0.8)
    expected = image.resize((10, 10), Image.Resampling.BILINEAR).crop((1, 1, 9, 9))
    np.testing.assert_array_equal(np.asarray(squash.resized(image, (8, 8))), np.asarray(expected))
    preprocessing = images.Preprocessing(mean=[0.5, 0.2], std=[0.5, 0.1])
    normalised = preprocessing.normalise(np.uint8([[255, 51]]))
    helpers.assert_close(normalised, np.array([[1.0, 0.0]]), 1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", images.RESIZES)
def test_only_what_the_crop_keeps_is_the_same_within_rounding(monkeypatch, interpolation, resize):
    """Of photographs; Pillow may take rows before columns in the one and not in the other."""
    how = images.Preprocessing(interpolation=interpolation, resize=resize, crop_share=0.875)
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels)
        whole = np.asarray(how.resized(photograph, (96, 64)), int)
        with monkeypatch.context() as patch:
            patch.setattr(images, "WHOLE_LIMIT", 0)
            part = np.asarray(how.resized(photograph, (96, 64)), int)
        assert np.abs(part - whole).max() <= 2 and np.abs(part - whole).mean() < 0.05


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_long_images_take_no_more_memory(tmp_path, size):
    """Resized by the shorter side, the whole of it would have 224 x 6,720,000 pixels."""
    values = np.linspace(0, 255, max(size)).astype(np.uint8)  # a ramp along the longer side
    Image.fromarray(np.broadcast_to(values.reshape(size), size)).save(tmp_path / "x.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    how = images.Preprocessing(interpolation="bicubic", resize="shorter_side")
    pixels = images.read(tmp_path / "x.png", (224, 224), 3, how)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    helpers.assert_close(pixels, 127.5, 0.01)


# --- Finding ------------------------------------------------------------------------------------


def test_folders_are_searched_for_what_users_mean(tmp_path):
    """Not for hidden files; folders named like images are folders; loops of links end."""
    for name in ("b.png", "deep/a.png", "folder.png/c.png", "folder.png/.d.png", ".trash/e.png"):
        save(tmp_path / name, RGB)
    (tmp_path / "._b.png").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other disks
    (tmp_path / "empty.jpg").mkdir()
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    (tmp_path / "deep/self").symlink_to(tmp_path / "deep")
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    save(outside / "f.png", RGB)
    (tmp_path / "link").symlink_to(outside)
    names = ["b.png", "deep/a.png", "folder.png/c.png", "link/f.png"]
    assert images.find([tmp_path]) == [tmp_path / name for name in names]
    hidden = tmp_path / ".trash/e.png"
    assert images.find([hidden, tmp_path / ".trash"]) == [hidden, hidden]  # named, so meant
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert tmp_path / "gone.png" in images.find([tmp_path])
    with pytest.raises(UserError, match=r"gone\.png: not an image that can be read \(No such file"):
        images.read(tmp_path / "gone.png", (8, 8), 3, PLAIN)
    with pytest.raises(UserError, match=r"empty\.jpg: holds no images"):
        images.find([tmp_path / "empty.jpg"])
    os.mkfifo(tmp_path / "pipe.png")
    assert tmp_path / "pipe.png" not in images.find([tmp_path])
    with pytest.raises(UserError, match=r"pipe\.png is neither a file nor a folder"):
        images.find([tmp_path / "pipe.png"])


def test_class_folders_hold_files_that_are_not_hidden(tmp_path):
    for name in ("ant", "bee"):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", RGB)
        (tmp_path / name / "._0.png").write_bytes(b"\0\5\x16\7")
        (tmp_path / name / "folder.png").mkdir()
    dataset = sources.load(f"folder:{tmp_path}")
    assert sorted([*dataset.train.names, *dataset.test.names]) == [
        f"{name}/{i}.png" for name in ("ant", "bee") for i in range(2)
    ]


# --- What cannot be read ------------------------------------------------------------------------


def bomb(path):
    """A PNG of 20,000 x 20,000 pixels by its header."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def no_pixels(path):
    """A PNG of no width."""
    bomb(path)
    content = bytearray(path.read_bytes())
    content[16:20] = bytes(4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: path.write_bytes(b""), "of no known format"),
        (bomb, r"more than 178,956,970 pixels; make it smaller"),
        (no_pixels, ""),
    ],
    ids=["no bytes", "bomb", "no pixels"],
)
def test_what_is_no_image_is_refused(tmp_path, write, says):
    write(tmp_path / "x.png")
    with pytest.raises(
        UserError, match=rf"x\.png: not an image that can be read \({says}"
    ) as error:
        images.read(tmp_path / "x.png", (8, 8), 3, PLAIN)
    assert "\n" not in str(error.value)
