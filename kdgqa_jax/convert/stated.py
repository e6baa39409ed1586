"""What lies beside the weights says of the architecture: our metadata, or a config.json."""

import dataclasses
import math
from typing import Any

from kdgqa_jax.convert import timm_config
from kdgqa_jax.convert.files import Source
from kdgqa_jax.errors import LARGEST, UserError, one_line

_HUGGING_FACE = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_epsilon",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "qkv_bias": "qkv_bias",
}
"""Fields of transformers' ViTConfig and what they are here."""

_HUGGING_FACE_MODELS = ("vit", "deit", "vit_msn", "vit_mae", "timm_wrapper")
"""`model_type` of the models that compute alike, from weights of the same names."""


@dataclasses.dataclass
class Stated:
    """What a source says of itself.

    Attributes:
      place: what errors call the place where it says so.
      values: by our name (an option of `vit.create`, or "channels"): (their name, value). Only
        what is stated is there.
      heads_of: the width of the model to which a stated number of heads belongs; None: to any.
    """

    place: str
    values: dict[str, tuple[str, Any]]
    heads_of: int | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """A value by our name."""
        return self.values[name][1] if name in self.values else default

    def check(self, found: dict[str, Any], source: Source) -> None:
        """Raise UserError where `found` in the weights, by our names, is something else."""
        wrong = [
            f"{theirs}={value!r} there, {found[name]!r} in the weights"
            for name, (theirs, value) in self.values.items()
            if found.get(name, value) != value
        ]
        if wrong:
            raise UserError(
                f"{self.place} does not fit {source.path.name}: {'; '.join(wrong)}; fetch both"
                " again"
            )


def stated(source: Source) -> Stated:
    """What is stated beside the weights, checked by its kind.

    Our own metadata says everything, and a config.json beside such a file is not looked at.

    Raises UserError: of another kind than expected, or an architecture that is not the one here.
    """
    if source.metadata:
        return _of_metadata(source)
    place = str(source.path.parent / "config.json")
    heads_of = None
    if timm_config.is_timm(source.config):
        found, heads_of = timm_config.values(source.config, place)
    else:
        found = _of_hugging_face(source.config, place)
    for name, (theirs, value) in found.items():
        found[name] = (theirs, _checked(name, theirs, value, place))
    return Stated(place, found, heads_of)


def _of_hugging_face(config: dict[str, Any], place: str) -> dict[str, tuple[str, Any]]:
    model = config.get("model_type")
    if model is not None and model not in _HUGGING_FACE_MODELS:
        raise UserError(
            f"{place}: model_type={one_line(repr(model), 60)}; its computation is not known to be"
            f" that of the ViT here: expected {', '.join(_HUGGING_FACE_MODELS)}"
        )
    for field, known in (("hidden_act", ("gelu", "gelu_python")), ("pooler_act", ("tanh",))):
        if config.get(field, known[0]) not in known:
            raise UserError(
                f"{place}: {field}={one_line(repr(config[field]), 60)}; the model here has"
                f" {known[0]!r} alone"
            )
    return {
        ours: (theirs, config[theirs])
        for theirs, ours in _HUGGING_FACE.items()
        if config.get(theirs) is not None
    }


def _of_metadata(source: Source) -> Stated:
    place = f"{source.path}: metadata"
    kinds = {"model": dict, "class_names": list, "norm_stats": dict, "allocation": dict}
    for name, kind in kinds.items():
        if name in source.metadata and not isinstance(source.metadata[name], kind):
            raise UserError(
                f"{place}: {name}={one_line(repr(source.metadata[name]), 60)} is no"
                f" {'JSON object' if kind is dict else 'list'}; export the model again"
            )
    model = source.metadata.get("model", {})
    names = ("num_heads", "image_size", "norm_epsilon")
    values = {name: (name, model[name]) for name in names if model.get(name) is not None}
    for name, (_, value) in values.items():
        values[name] = (name, _checked(name, name, value, place))
    return Stated(place, values)


def _checked(name: str, theirs: str, value: Any, place: str) -> Any:
    """The value in our form. Raises UserError if it is of another kind than it has to be."""
    refusal = f"{place}: {theirs}={one_line(repr(value), 60)} must be "
    if name in ("pool", "qkv_bias", "class_token"):
        return value
    if name == "norm_epsilon":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1 or not math.isfinite(value):
            raise UserError(refusal + "a number from 0 to 1")
        return float(value)
    if name in ("image_size", "patch_size"):
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(_is_whole(side) and side > 0 for side in sides):
            raise UserError(refusal + "a side in pixels, or [height, width]")
        if name == "image_size":
            return tuple(sides)
        return sides[0] if sides[0] == sides[1] else tuple(sides)
    if not _is_whole(value) or value < 0:
        raise UserError(refusal + "a whole number")
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= LARGEST
