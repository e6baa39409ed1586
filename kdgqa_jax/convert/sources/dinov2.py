"""DINOv2, with and without registers: as transformers writes it, and as its authors released it.

Registers have no position, so that of the class token is added to it (as in timm's files of these
models) and the position embedding is that of the patches alone.
"""

from typing import Any

from kdgqa_jax.convert.sources import hugging_face, hugging_face_config, timm
from kdgqa_jax.convert.sources.layout import Bench, Layout, fold_class_position, numbered
from kdgqa_jax.convert.sources.stated import Stated

# --- transformers -------------------------------------------------------------------------------

_BLOCK = {
    "norm1": "norm1", "norm2": "norm2", "ls1": "layer_scale1.lambda1",
    "ls2": "layer_scale2.lambda1", **hugging_face.BLOCK_5, "mlp/gate": "mlp.gate_proj",
}  # fmt: skip
_NAMES = {
    **hugging_face.EMBEDDINGS,
    "reg_token": "embeddings.register_tokens",
    **numbered("encoder.layer.{i}", _BLOCK),
}
_RENAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),  # transformers 4
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
)
_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}


def _surgery(bench: Bench) -> None:
    for match in bench.matches(r"encoder\.layer\.\d+\.mlp\.weights_in\.(weight|bias)"):
        array, leaf = bench.arrays[match[0]], match[1]
        mlp = match[0].removesuffix(f".weights_in.{leaf}")
        if array.ndim and len(array) and len(array) % 2 == 0:
            gate, hidden = array[: len(array) // 2], array[len(array) // 2 :]
            del bench.arrays[match[0]]
            bench.put(f"{mlp}.gate_proj.{leaf}", gate, match[0], "first half")
            bench.put(f"{mlp}.fc1.{leaf}", hidden, match[0], "second half")
    if "embeddings.register_tokens" in bench.arrays:
        fold_class_position(bench, "embeddings.cls_token", "embeddings.position_embeddings")
    head, width = bench.get("classifier.weight", 2), bench.get("layernorm.weight", 1)
    if head is not None and width is not None and head.shape[1] == 2 * len(width):
        # No pool here gives the two beside each other; under this name it is reported as left over.
        for leaf in ("weight", "bias"):
            if f"classifier.{leaf}" in bench.arrays:
                array = bench.arrays.pop(f"classifier.{leaf}")
                bench.arrays[f"classifier_of_class_token_and_mean.{leaf}"] = array


def _stated(config: dict[str, Any], place: str) -> Stated:
    models = ("dinov2", "dinov2_with_registers")
    # Registers of models without any are 4 by default; SwiGLU has no intermediate_size.
    ignored = ("intermediate_size",)
    if config.get("model_type") != "dinov2_with_registers":
        ignored += ("num_register_tokens",)
    facts = hugging_face_config.stated(config, place, models, _DEFAULTS, ignored)
    if config.get("use_swiglu_ffn"):
        facts.values["activation"] = ("use_swiglu_ffn", "silu")
    return facts


_COMMON = {
    "ignored": (r"(embeddings\.)?mask_token",),
    "surgery": _surgery,
    "defaults": {"norm_epsilon": 1e-6},
    "gated_defaults": {"activation": "silu"},
    "resize_with_registers": "timm",
}

# --- the authors' -------------------------------------------------------------------------------

_OWN_RENAMES = (
    (r"^(module|backbone|teacher|student)\.", ""),
    (r"^(teacher|student)\.", ""),
    (r"^backbone\.", ""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of blocks
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def _own_surgery(bench: Bench) -> None:
    timm.split_gate(bench, packed="w12")
    if "reg_token" in bench.arrays:
        fold_class_position(bench, "cls_token", "pos_embed")


LAYOUTS = {
    "dinov2_transformers": Layout(
        "Hugging Face DINOv2", _NAMES, renames=_RENAMES, stated=_stated, resize="torch_bicubic",
        any_size=True,
        **_COMMON,
    ),
    "dinov2": Layout(
        "DINOv2's own", timm.NAMES, renames=_OWN_RENAMES, stated=timm.stated, resize="dinov2",
        **{**_COMMON, "surgery": _own_surgery},
    ),
}  # fmt: skip
