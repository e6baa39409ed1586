"""How images were prepared for a model, as its source says it."""

from typing import Any

from kdgqa_jax.convert.files import Source
from kdgqa_jax.errors import UserError

_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def describe(source: Source, image_shape: tuple[int, int]) -> dict[str, Any] | None:
    """Fields of `data.images.Preprocessing`; None where the source says nothing.

    From the metadata of our own export, from Hugging Face's preprocessor_config.json, or from
    timm's config.json (pretrained_cfg).
    """
    side = min(image_shape)
    if "preprocessing" in source.metadata:
        return source.metadata["preprocessing"]
    if "image_mean" in source.preprocessor:
        return _hugging_face(source.preprocessor, side)
    if isinstance(source.config.get("pretrained_cfg"), dict):
        return _timm(source.config["pretrained_cfg"])
    return None


def _hugging_face(config: dict[str, Any], side: int) -> dict[str, Any]:
    size, resize = config.get("size", side), "squash"
    if isinstance(size, dict) and "shortest_edge" in size:
        size, resize = size["shortest_edge"], "shorter_side"
    elif isinstance(size, dict):
        size = size.get("height", side)
    cropped = config.get("do_center_crop", False) and isinstance(size, int) and size > side
    return {
        "mean": _vector(config, "image_mean"),
        "std": _vector(config, "image_std"),
        "interpolation": _PIL_FILTERS.get(config.get("resample"), "bilinear"),
        "resize": resize,
        "crop_share": side / size if cropped else 1.0,
    }


def _timm(config: dict[str, Any]) -> dict[str, Any]:
    share = config.get("crop_pct", 1.0)
    squash = config.get("crop_mode") == "squash"
    return {
        "mean": _vector(config, "mean"),
        "std": _vector(config, "std"),
        "interpolation": config.get("interpolation", "bicubic"),
        "resize": "squash" if squash else "shorter_side",
        "crop_share": share if isinstance(share, int | float) and 0 < share <= 1 else 1.0,
    }


def _vector(config: dict[str, Any], field: str) -> list[float]:
    value = config.get(field)
    if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
        raise UserError(f"{field}={value!r} beside the weights must be a list of numbers")
    return [float(x) for x in value]
