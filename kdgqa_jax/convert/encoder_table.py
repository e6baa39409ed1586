"""What transformers calls the parts of its text and audio encoders: a table with a row for each."""

import dataclasses
from typing import Any

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What transformers calls an activation -> its name in `layers.ACTIVATIONS`."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`.

    Attributes:
      prefixes: what may stand in front of all names; the first that does counts.
      layer: name of a layer.
      names: in it, of the projections "query", "key", "value", "out", "fc1" and "fc2" and of the
        norms of attention and MLP, "norm1" and "norm2". A bias that is not there is none.
      post_norm: norms come after the sums, as in BERT; else before attention and MLP.
      embedding: how inputs become tokens, a name in `encoder_forward.EMBEDDINGS`.
      fields: of the config, by our name: what transformers calls it, and its default.
      section: of the config that holds them; "": itself.
      expected: fields that must have these values, where they are there: with others it computes
        other things.
      embedding_norm: the norm after the embedding, which the first layer of post_norm sees.
      final_norm: the norm after the last layer; None: there is none.
      causal: tokens attend to those before them alone.
      takes: what the inputs are, "token ids" or "features".
      side: of a model with more than an encoder, what is meant; the rest stays as it is.
    """

    prefixes: tuple[str, ...]
    layer: str
    names: dict[str, str]
    post_norm: bool
    embedding: str
    fields: dict[str, tuple[str, Any]]
    section: str = ""
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)
    embedding_norm: str | None = None
    final_norm: str | None = None
    causal: bool = False
    takes: str = "token ids"
    side: str = ""


_TEXT_FIELDS = {
    "num_heads": ("num_attention_heads", 12),
    "activation": ("hidden_act", "gelu"),
    "epsilon": ("layer_norm_eps", 1e-12),
}

_BERT = Architecture(
    prefixes=("", "bert."),
    layer="encoder.layer.{}.",
    names={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "norm2": "output.LayerNorm",
    },
    post_norm=True,
    embedding="bert",
    fields={**_TEXT_FIELDS, "padding": ("pad_token_id", 0)},
    expected={
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    embedding_norm="embeddings.LayerNorm",
)

_ROBERTA = dataclasses.replace(
    _BERT,
    prefixes=("", "roberta."),
    embedding="roberta",
    fields={**_TEXT_FIELDS, "padding": ("pad_token_id", 1)},
)

_CLIP_TEXT = Architecture(
    prefixes=("text_model.", ""),
    layer="encoder.layers.{}.",
    names={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "norm1": "layer_norm1",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
        "norm2": "layer_norm2",
    },
    post_norm=False,
    embedding="clip",
    fields={
        "num_heads": ("num_attention_heads", 8),
        "activation": ("hidden_act", "quick_gelu"),
        "epsilon": ("layer_norm_eps", 1e-5),
        "end": ("eos_token_id", 49407),
    },
    final_norm="final_layer_norm",
    causal=True,
)

_WHISPER = Architecture(
    prefixes=("model.encoder.", "encoder."),
    layer="layers.{}.",
    names={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",  # without a bias
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "norm1": "self_attn_layer_norm",
        "fc1": "fc1",
        "fc2": "fc2",
        "norm2": "final_layer_norm",
    },
    post_norm=False,
    embedding="whisper",
    fields={
        "num_heads": ("encoder_attention_heads", 4),
        "activation": ("activation_function", "gelu"),
        "epsilon": ("layer_norm_eps", 1e-5),  # which Whisper does not have: PyTorch's
    },
    final_norm="layer_norm",
    takes="features",
    side="encoder",
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,  # MiniLM too
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "clip_text_model": _CLIP_TEXT,
    "clip": dataclasses.replace(_CLIP_TEXT, section="text_config", side="text side"),
    "whisper": _WHISPER,
}
"""By `model_type` in config.json. All but keys of Whisper have biases."""
