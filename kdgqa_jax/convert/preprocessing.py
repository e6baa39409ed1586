"""How images were prepared for a model, as its source says it: honoured, or refused by name."""

import math
import re
from collections.abc import Mapping
from typing import Any

from kdgqa_jax.convert.files import Source
from kdgqa_jax.convert.sources import open_clip, timm
from kdgqa_jax.errors import UserError, one_line
from kdgqa_jax.model_json import check_preprocessing

_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

_VIT = {
    "do_resize": True,
    "size": 224,
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_CLIP = {
    **_VIT,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_PROCESSORS: Mapping[str, Mapping[str, Any]] = {
    "ViT": _VIT,
    "CLIP": _CLIP,
    "Bit": _CLIP,  # which DINOv2 has
    "Siglip": {**_VIT, "resample": 3},
    "DeiT": {**_VIT, "size": 256, "resample": 3, "do_center_crop": True},
}
"""What image processors of transformers do unless their preprocessor_config.json says otherwise."""

_NO_MATTER = (
    r"image_processor_type|feature_extractor_type|processor_class|crop_size|do_convert_rgb"
    r"|return_tensors|data_format|input_data_format|default_to_square|device|_.*"
)

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # timm's defaults
_TIMM_CROP = 0.875  # the same


def describe(source: Source, image_shape: tuple[int, int]) -> dict[str, Any] | None:
    """Fields of `data.images.Preprocessing`; None where the source says nothing.

    From the metadata of our own export, from Hugging Face's preprocessor_config.json, or from
    timm's config.json (pretrained_cfg).

    Raises UserError: something that would be done to images and is not done here.
    """
    if source.metadata:
        return _of_metadata(source)
    if source.preprocessor:
        place = str(source.path.parent / "preprocessor_config.json")
        return _HuggingFace(source.preprocessor, place).describe(image_shape)
    if timm.is_timm(source.config):
        place = str(source.path.parent / "config.json")
        return _timm(timm.pretrained_cfg(source.config, place), place)
    beside = source.beside(open_clip.CONFIG_FILE)
    if beside:
        return _open_clip(beside, str(source.path.parent / open_clip.CONFIG_FILE))
    return None


def size(source: Source) -> tuple[int, int] | None:
    """(height, width) of the images that a Hugging Face processor gives; None: not said."""
    if source.metadata or not source.preprocessor:
        return None
    place = str(source.path.parent / "preprocessor_config.json")
    return _HuggingFace(source.preprocessor, place).result()


def _of_metadata(source: Source) -> dict[str, Any] | None:
    found = source.metadata.get("preprocessing")
    if found is not None and not isinstance(found, dict):
        raise UserError(
            f"{source.path}: preprocessing={_shown(found)} in its metadata must be a JSON object;"
            " export the model again"
        )
    if found is not None:
        check_preprocessing(found, source.path)
    return found


class _HuggingFace:
    """A preprocessor_config.json with the defaults of its image processor."""

    def __init__(self, config: dict[str, Any], place: str):
        self.place = place
        kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "ViT"
        kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(kind))
        stated = {name: value for name, value in config.items() if value is not None}
        self.known = kind in _PROCESSORS
        self.fields = {**_PROCESSORS.get(kind, {}), **stated}
        if kind in ("CLIP", "Bit") and type(self.fields["size"]) is int:
            self.fields["size"] = {"shortest_edge": self.fields["size"]}
        missing = sorted(_VIT.keys() - self.fields.keys())
        if missing:
            raise self.refuse(
                f"does not say {', '.join(missing)}, and what {_shown(kind)} does by default is not"
                f" known; known: {', '.join(_PROCESSORS)}"
            )
        for name, value in stated.items():
            if name not in _VIT and not re.fullmatch(_NO_MATTER, name) and value is not False:
                raise self.refuse(
                    f"{one_line(name, 60)}={_shown(value)} asks for something that is not done"
                    " to images here"
                )
        for name, value in self.fields.items():
            if name in _VIT and name.startswith("do_") and not isinstance(value, bool):
                raise self.refuse(f"{name}={_shown(value)} must be true or false")

    def refuse(self, problem: str) -> UserError:
        return UserError(f"{self.place}: {problem}")

    def describe(self, image_shape: tuple[int, int]) -> dict[str, Any]:
        """Fields of `data.images.Preprocessing`."""
        resample = self.fields["resample"]
        if type(resample) is not int or resample not in _PIL_FILTERS:
            raise self.refuse(f"resample={_shown(resample)}; expected {_shown(_PIL_FILTERS)}")
        resize, share = self._resize(image_shape)
        return {
            **self._statistics(),
            "interpolation": _PIL_FILTERS[resample],
            "resize": resize,
            "crop_share": share,
            "rounding": "hugging_face",
        }

    def result(self) -> tuple[int, int] | None:
        """(height, width) of the images that come out, where they are all of one size."""
        name = "crop_size" if self.fields["do_center_crop"] else "size"
        value = self.fields.get(name)
        if isinstance(value, dict) and value.keys() == {"shortest_edge"}:
            return None
        return None if value is None else self._sides(name, value)

    def _resize(self, shape: tuple[int, int]) -> tuple[str, float]:
        """(resize, crop_share). Raises UserError where they cannot give what is asked for."""
        size, crops = self.fields["size"], self.fields["do_center_crop"]
        if not self.fields["do_resize"]:
            raise self.refuse("do_resize=false; images are always resized here")
        crop = self._sides("crop_size", self.fields.get("crop_size", list(shape)))
        if crops and crop != shape:
            raise self.refuse(f"crop_size={_shown(crop)} is not the size of the model, {shape}")
        if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
            shortest = size["shortest_edge"]
            if type(shortest) is not int or not crops or shape[0] != shape[1]:
                raise self.refuse(
                    f"size={_shown(size)} without do_center_crop, or for images of {shape}; only a"
                    " square crop of a resized image is made here"
                )
            sides = (shortest, shortest)
        else:
            sides, shortest = self._sides("size", size), None
        share = shape[0] / sides[0] if sides[0] > 0 else 0.0
        exact = 0 < share <= 1 and all(
            round(a / share) == b for a, b in zip(shape, sides, strict=True)
        )
        if not exact or (not crops and sides != shape):
            raise self.refuse(
                f"size={_shown(size)}{'' if crops else ' without do_center_crop'} does not lead to"
                f" images of {shape}, which the model takes"
            )
        return ("squash" if shortest is None else "shorter_side"), share

    def _sides(self, name: str, size: Any) -> tuple[int, int]:
        sides = size
        if isinstance(size, dict) and size.keys() == {"height", "width"}:
            sides = [size["height"], size["width"]]
        elif type(size) is int and (self.known or name == "crop_size"):
            sides = [size, size]
        if not isinstance(sides, list) or [type(side) for side in sides] != [int, int]:
            raise self.refuse(
                f"{name}={_shown(size)} must be a side in pixels, or an object of height and width"
            )
        return tuple(sides)

    def _statistics(self) -> dict[str, Any]:
        """mean and std of pixel values in 0..1, into which another factor than 1/255 goes."""
        factor = self.fields["rescale_factor"] if self.fields["do_rescale"] else 1.0
        if not _is_number(factor) or factor <= 0:
            raise self.refuse(f"rescale_factor={_shown(factor)} must be a number above 0")
        largest = 255 * factor
        largest = 1.0 if math.isclose(largest, 1.0, rel_tol=1e-6) else largest
        if not self.fields["do_normalize"]:
            return {"mean": 0.0, "std": 1.0 / largest}
        found = {"mean": self.fields["image_mean"], "std": self.fields["image_std"]}
        for name, value in found.items():
            found[name] = [x / largest for x in _vector(f"image_{name}", value, self.place)]
        return found


def _timm(config: dict[str, Any], place: str) -> dict[str, Any] | None:
    """As timm's own evaluation transform does it; None where nothing is said of pixel values."""
    if config.get("mean") is None and config.get("std") is None:
        return None
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise UserError(f"{place}: crop_mode={_shown(mode)}; expected 'center' or 'squash'")
    share = config.get("crop_pct") or _TIMM_CROP
    if not _is_number(share) or not 0 < share <= 1:
        raise UserError(f"{place}: crop_pct={_shown(share)} must be above 0 and at most 1")
    filters = tuple(_PIL_FILTERS.values())
    interpolation = config.get("interpolation") or "bicubic"
    if interpolation not in filters:
        raise UserError(
            f"{place}: interpolation={_shown(interpolation)}; expected one of {', '.join(filters)}"
        )
    return {
        **{name: _vector(name, config.get(name) or _IMAGENET[name], place) for name in _IMAGENET},
        "interpolation": interpolation,
        "resize": "squash" if mode == "squash" else "shorter_side",
        "crop_share": share,
        "rounding": "timm",
    }


def _open_clip(config: dict[str, Any], place: str) -> dict[str, Any]:
    """As OpenCLIP's own evaluation transform does it."""
    found = config.get("preprocess_cfg") or {}
    if not isinstance(found, dict):
        raise UserError(f"{place}: preprocess_cfg={_shown(found)} must be a JSON object")
    said = (found.get("interpolation", "bicubic"), found.get("resize_mode", "shortest"))
    if said[0] not in ("bicubic", "bilinear") or said[1] not in ("shortest", "squash"):
        raise UserError(f"{place}: interpolation and resize_mode {_shown(said)} are not done here")
    return {
        **{n: _vector(n, found.get(n) or _CLIP[f"image_{n}"], place) for n in ("mean", "std")},
        "interpolation": said[0],
        "resize": "squash" if said[1] == "squash" else "shorter_side",
        "crop_share": 1.0,
        "rounding": "hugging_face",
    }


def _vector(name: str, value: Any, place: str) -> list[float]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(map(_is_number, values)):
        raise UserError(f"{place}: {name}={_shown(value)} must be a list of numbers")
    return [float(x) for x in values]


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < 1e30  # which is false for NaN


def _shown(value: Any) -> str:
    return one_line(repr(value), 80)
