"""The config.json of Hugging Face transformers: what it says of a vision tower."""

from collections.abc import Mapping
from typing import Any

from kdgqa_jax.convert.sources.stated import Stated, Values, checked
from kdgqa_jax.errors import UserError, one_line

_FIELDS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_epsilon",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "channels",
    "qkv_bias": "qkv_bias",
    "num_register_tokens": "reg_tokens",
}
"""Fields of configs of vision models and what they are here."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Values of `hidden_act`."""

VIT_MODELS = ("vit", "deit", "vit_msn", "vit_mae", "timm_wrapper")
"""`model_type` of the models that compute alike, from weights of the same names."""


def stated(
    config: dict[str, Any],
    place: str,
    models: tuple[str, ...] = VIT_MODELS,
    defaults: Mapping[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> Stated:
    """What a config.json says.

    Args:
      config: the JSON object; of a model of two towers, its `vision_config` counts.
      place: what errors call it.
      models: the values of `model_type` that the layout of the weights belongs to.
      defaults: fields as the class of transformers has them where the config leaves them out.
      ignored: fields that mean nothing in such models.

    Raises:
      UserError: another kind of model, or something that is not computed here, by its name.
    """
    model = config.get("model_type")
    if model is not None and model not in models:
        raise UserError(
            f"{place}: model_type={_shown(model)}; its computation is not known to be"
            f" that of the ViT here: expected {', '.join(models)}"
        )
    tower = config.get("vision_config", {})
    if not isinstance(tower, dict):
        raise UserError(f"{place}: vision_config={_shown(tower)} must be a JSON object")
    config = {**(defaults or {} if config else {}), **config, **tower}
    if config.get("pooler_act", "tanh") != "tanh":
        raise UserError(
            f"{place}: pooler_act={_shown(config['pooler_act'])}; the model here has 'tanh' alone"
        )
    values: Values = {
        ours: (theirs, config[theirs])
        for theirs, ours in _FIELDS.items()
        if config.get(theirs) is not None and theirs not in ignored
    }
    if config.get("hidden_act") is not None:
        values["activation"] = ("hidden_act", activation(config["hidden_act"], place))
    return checked(place, values)


def activation(name: Any, place: str) -> str:
    """An activation by transformers' name. Raises UserError for one that is not known."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(
            f"{place}: hidden_act={_shown(name)}; the model here has one of"
            f" {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)
