"""Images are prepared as the source prepared them, or the source is refused."""

import itertools
import json
import math
import pathlib

import helpers
import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.numpy import save_file

from kdgqa_jax import convert
from kdgqa_jax.convert import files, preprocessing
from kdgqa_jax.data.images import Preprocessing, to_array
from kdgqa_jax.errors import UserError

SIZES = [(47, 61), (64, 50), (40, 40), (31, 97), (101, 38)]


def picture(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def described(shape, config=None, preprocessor=None):
    source = files.Source(
        pathlib.Path("a/model.safetensors"), {}, config or {}, preprocessor or {}, {}
    )
    return preprocessing.describe(source, shape)


def prepared(fields, image, shape):
    """What the model gets: NHWC float32."""
    ours = Preprocessing(**fields)
    return ours.normalise(to_array(ours.resized(image, shape)))


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"height": 24, "width": 32}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 0.8], "image_std": [1, 0.5, 2]},
        {"do_center_crop": True, "size": {"height": 40, "width": 40},
         "crop_size": {"height": 32, "width": 32}},
        *({"resample": resample} for resample in range(6)),
    ],
)  # fmt: skip
def test_as_the_image_processor_of_transformers_does_it(changes):
    kind = "DeiTImageProcessor" if "crop_size" in changes else "ViTImageProcessor"
    fields = {"size": {"height": 32, "width": 32}, **changes}
    processor = getattr(transformers, f"{kind}Pil")(**fields)
    config = {**json.loads(processor.to_json_string()), "image_processor_type": kind}
    shape = (fields["size"]["height"], fields["size"]["width"])
    shape = (32, 32) if "crop_size" in changes else shape
    found = described(shape, preprocessor=config)
    for i, size in enumerate(SIZES):
        image = picture(*size, i)
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = prepared(found, image, shape)
        scale = np.abs(expected).max()
        helpers.assert_close(ours / scale, expected / scale, 2e-6)


@pytest.mark.parametrize("shortest", [32, 36, 37])
def test_the_shortest_edge_and_a_crop_as_transformers_does_them(shortest):
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": shortest}, crop_size=32, resample=3
    )
    config = json.loads(processor.to_json_string())
    found = described((32, 32), preprocessor={**config, "image_processor_type": "CLIPFast"})
    for i, size in enumerate(SIZES):
        image = picture(*size, i)
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        helpers.assert_close(prepared(found, image, (32, 32)), expected, 1e-5)


FULL = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 2,
    "size": {"height": 32, "width": 32}, "do_center_crop": False, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"do_resize": False}, "do_resize=false; images are always resized here"),
        ({"size": {"height": 32, "width": 16}}, "does not lead to images of (32, 32)"),
        ({"size": 48}, "size=48 without do_center_crop does not lead to images of (32, 32)"),
        ({"size": {"shortest_edge": 32}}, "without do_center_crop"),
        ({"size": {"longest_edge": 32}}, "must be a side in pixels, or an object"),
        ({"size": 48, "do_center_crop": True, "crop_size": 40}, "crop_size=(40, 40) is not the"),
        ({"size": 24, "do_center_crop": True, "crop_size": 32}, "size=24 does not lead to"),
        ({"resample": 9}, "resample=9; expected"),
        ({"resample": "bicubic"}, "resample='bicubic'; expected"),
        ({"rescale_factor": 0}, "rescale_factor=0 must be a number above 0"),
        ({"do_normalize": 1}, "do_normalize=1 must be true or false"),
        ({"image_mean": "grey"}, "image_mean='grey' must be a list of numbers"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True asks for something"),
        ({"crop_pct": 0.9}, "crop_pct=0.9 asks for something"),
        ({"do_pad": True}, "do_pad=True asks for something"),
        ({"image_processor_type": "NewImageProcessor", "resample": None}, "does not say resample"),
    ],
)
def test_what_is_not_done_here_is_refused(changes, says):
    with pytest.raises(UserError) as error:
        described((32, 32), preprocessor={**FULL, **changes})
    assert says in str(error.value) and "preprocessor_config.json: " in str(error.value)


def test_fields_that_do_not_matter_are_accepted():
    more = {"do_convert_rgb": True, "do_pad": False, "_valid_processor_keys": ["a"],
            "return_tensors": "pt", "pad_size": None}  # fmt: skip
    found = described((32, 32), preprocessor={**FULL, **more})
    assert found == described((32, 32), preprocessor=FULL)
    old = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
           "feature_extractor_type": "ViTFeatureExtractor"}  # fmt: skip
    assert described((32, 32), preprocessor=old) == found


# --- timm ---------------------------------------------------------------------------------------


def timm_evaluation(image, shape, crop_pct, mode, filter_):
    """timm's transform for evaluation, step by step on PIL images as torchvision does it."""
    target = [math.floor(side / crop_pct) for side in shape]
    height, width = image.height, image.width
    if mode == "squash":
        new = target
    elif target[0] == target[1]:  # torchvision: Resize(side)
        short, long = min(height, width), max(height, width)
        new_long = int(target[0] * long / short)
        new = (new_long, target[0]) if height > width else (target[0], new_long)
    else:  # ResizeKeepRatio, by the axis that needs it
        ratio = min(height / target[0], width / target[1])
        new = (round(height / ratio), round(width / ratio))
    image = image.resize((new[1], new[0]), filter_)
    top, left = (round((n - side) / 2) for n, side in zip(new, shape, strict=True))
    return image.crop((left, top, left + shape[1], top + shape[0]))


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.9, 0.875, 1.0, 0.95])
@pytest.mark.parametrize("shape", [(32, 32), (64, 16)])
def test_as_timm_prepares_images(mode, crop_pct, shape):
    config = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": crop_pct, "crop_mode": mode,
        "interpolation": "bicubic"}}  # fmt: skip
    found = described(shape, config)
    for i, size in enumerate(SIZES):
        image = picture(*size, i)
        expected = timm_evaluation(image, shape, crop_pct, mode, Image.Resampling.BICUBIC)
        expected = (np.asarray(expected) / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
        helpers.assert_close(prepared(found, image, shape), expected, 1e-5)


def test_timm_rounds_the_resized_side_down():
    """224 / 0.9 = 248.9: timm resizes to 248, to the nearest would be 249."""
    image = picture(248, 248)
    fields = {"resize": "shorter_side", "crop_share": 0.9, "interpolation": "nearest"}
    crop = np.asarray(Preprocessing(**fields, rounding="timm").resized(image, (224, 224)))
    np.testing.assert_array_equal(crop, np.asarray(image)[12:236, 12:236])
    before = np.asarray(Preprocessing(**fields).resized(image, (224, 224)))
    assert (before != crop).any()  # what model directories of before keep


def test_defaults_of_timm_and_what_it_asks_for_beyond():
    def fields(**pretrained):
        config = {"architecture": "vit_base_patch16_224", "pretrained_cfg": pretrained}
        return described((32, 32), config)

    assert fields(mean=[0.5] * 3) == {
        "mean": [0.5] * 3, "std": [0.229, 0.224, 0.225], "interpolation": "bicubic",
        "resize": "shorter_side", "crop_share": 0.875, "rounding": "timm",
    }  # fmt: skip
    assert fields() is None
    for changes in ({"crop_mode": "border"}, {"crop_pct": 1.1}, {"interpolation": "random"},
                    {"crop_pct": "0.9"}, {"std": [1, "a"]}):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(changes))):
            fields(**{"mean": [0.5] * 3, **changes})


# --- one channel of three -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.1, 0.5, 0.9], [2.0, 0.1, 0.5]),
     ([0.4], [0.3])],
)  # fmt: skip
def test_a_grey_image_gives_what_it_gave_as_rgb(golden, tmp_path, mean, std):
    """Through the whole way: normalised as the descriptions say, then the model."""
    weights = helpers.golden_weights(golden("timm_vit"))
    save_file(weights, tmp_path / "model.safetensors")
    config = {"image_mean": mean * (3 // len(mean)), "image_std": std * (3 // len(std)), "size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    rgb = convert.load(tmp_path, num_heads=6)
    grey = convert.load(tmp_path, num_heads=6, channels=1)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)
    logits = []
    for converted, images in ((rgb, np.repeat(pixels, 3, axis=-1)), (grey, pixels)):
        fields = converted.description["preprocessing"]
        assert len(fields["mean"]) == len(fields["std"]) == converted.description["channels"]
        images = Preprocessing(**fields).normalise(images)
        logits.append(np.asarray(helpers.apply(converted.model, converted.variables, images)))
    helpers.assert_close(logits[1], logits[0], 2e-5)


def test_more_channels_repeat_their_statistics(golden, tmp_path):
    save_file(helpers.golden_weights(golden("timm_vit")), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "size": 32})
    )
    found = convert.load(tmp_path, num_heads=6, channels=5).description["preprocessing"]
    assert found["mean"] == [0.1, 0.2, 0.3, 0.1, 0.2] and found["std"] == [1, 2, 3, 1, 2]


def test_values_of_any_type_are_refused_in_a_sentence_or_read():
    values = [None, True, -1, 0, 2.5, 10**400, math.nan, math.inf, "x", [], [1], {}, {"a": 1}]
    refused = 0
    for field, value in itertools.product([*FULL, "crop_size", "other"], values):
        for crops in (False, True):
            try:
                config = {**FULL, "do_center_crop": crops, field: value}
                Preprocessing(**described((32, 32), preprocessor=config))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
                refused += 1
    assert refused > 200
