"""What each framework calls the parameters of a ViT. `LAYOUTS` is the table.

Our names are paths such as `blocks_3/attn/query/kernel`; `{i}` stands for the number of a block.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

# --- how arrays differ --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transform:
    """Between an array of PyTorch and ours; `read` also gets the width of a head."""

    how: str
    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


_SAME = Transform("", lambda x, _: x, lambda x: x)

_PYTORCH: dict[str, Transform] = {
    r"patch_embed/kernel": Transform(  # (D, C, P, P) and (P, P, C, D)
        "channels last", lambda x, _: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    ),
    r".*/attn/(query|key|value)/kernel": Transform(  # (heads * H, D) and (D, heads, H)
        "transposed, by head",
        lambda x, width: x.T.reshape(x.shape[1], -1, width),
        lambda x: x.reshape(len(x), -1).T,
    ),
    r".*/attn/(query|key|value)/bias": Transform(  # (heads * H,) and (heads, H)
        "by head", lambda x, width: x.reshape(-1, width), lambda x: x.reshape(-1)
    ),
    r".*/attn/out/kernel": Transform(  # (D, N * H) and (N, H, D)
        "transposed, by head",
        lambda x, width: x.T.reshape(-1, width, len(x)),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
    r".*/kernel": Transform("transposed", lambda x, _: x.T, lambda x: x.T),  # (out, in), (in, out)
    r".*": _SAME,
}
"""By our name; the first row that matches."""


# --- names --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and array forms of one framework.

    Attributes:
      title: of the framework.
      names: our module or array -> theirs; "#j": the j-th third of the rows of theirs.
      pytorch: arrays are in PyTorch's form and leaves are called weight and bias; otherwise arrays
        and leaves are as ours.
      renames: (pattern, replacement) applied to the names of a file before they are looked up.
      norm_epsilon: of LayerNorm, where the source does not say.
    """

    title: str
    names: Mapping[str, str]
    pytorch: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    norm_epsilon: float = 1e-6

    def canonical(self, name: str) -> str:
        """The name of an array of a file as `names` has it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def theirs(self, ours: str) -> tuple[str, int | None] | None:
        """(name, third or None) of one of our arrays; None if the layout does not have it."""
        number = re.match(r"blocks_(\d+)/", ours)
        general = re.sub(r"^blocks_\d+/", "blocks_{i}/", ours)
        if general in self.names:
            name = self.names[general]
        else:
            module, _, leaf = general.rpartition("/")
            if module not in self.names:
                return None
            if self.pytorch:
                leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
            base, mark, third = self.names[module].partition("#")
            name = f"{base}{'.' if self.pytorch else '/'}{leaf}{mark}{third}"
        name, _, third = name.replace("{i}", number[1] if number else "").partition("#")
        return name, int(third) if third else None

    def transform(self, ours: str) -> Transform:
        """How the array is changed on the way in and out."""
        if not self.pytorch:
            return _SAME
        return next(t for pattern, t in _PYTORCH.items() if re.fullmatch(pattern, ours))

    def block_numbers(self, names: Iterable[str]) -> set[int]:
        """The numbers of the blocks whose attention has an array among `names`."""
        pattern = re.escape(self.names["blocks_{i}/attn/query"].partition("#")[0])
        pattern = pattern.replace(r"\{i\}", r"(\d{1,4})")
        found = (re.match(pattern, name) for name in names)
        return {int(match[1]) for match in found if match}


_TIMM = {
    "cls_token": "cls_token",
    "dist_token": "dist_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj",
    "blocks_{i}/norm1": "blocks.{i}.norm1",
    "blocks_{i}/attn/query": "blocks.{i}.attn.qkv#0",
    "blocks_{i}/attn/key": "blocks.{i}.attn.qkv#1",
    "blocks_{i}/attn/value": "blocks.{i}.attn.qkv#2",
    "blocks_{i}/attn/out": "blocks.{i}.attn.proj",
    "blocks_{i}/norm2": "blocks.{i}.norm2",
    "blocks_{i}/mlp/fc1": "blocks.{i}.mlp.fc1",
    "blocks_{i}/mlp/fc2": "blocks.{i}.mlp.fc2",
    "norm": "norm",
    "fc_norm": "fc_norm",
    "pre_logits": "pre_logits.fc",
    "head": "head",
    "head_dist": "head_dist",
}

_RELEASED = {
    **_TIMM,
    "blocks_{i}/attn/query": "blocks.{i}.attn.q",
    "blocks_{i}/attn/key": "blocks.{i}.attn.k",
    "blocks_{i}/attn/value": "blocks.{i}.attn.v",
    "blocks_{i}/attn/key_norm": "blocks.{i}.attn.cache",  # in norm_stats
}

_TRANSFORMERS_5 = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "blocks_{i}/norm1": "layers.{i}.layernorm_before",
    "blocks_{i}/attn/query": "layers.{i}.attention.q_proj",
    "blocks_{i}/attn/key": "layers.{i}.attention.k_proj",
    "blocks_{i}/attn/value": "layers.{i}.attention.v_proj",
    "blocks_{i}/attn/out": "layers.{i}.attention.o_proj",
    "blocks_{i}/norm2": "layers.{i}.layernorm_after",
    "blocks_{i}/mlp/fc1": "layers.{i}.mlp.fc1",
    "blocks_{i}/mlp/fc2": "layers.{i}.mlp.fc2",
    "norm": "layernorm",
    "pre_logits": "pooler.dense",
    "head": "classifier",
    "head_dist": "distillation_classifier",
}

_TRANSFORMERS_4 = {
    **_TRANSFORMERS_5,
    "blocks_{i}/norm1": "encoder.layer.{i}.layernorm_before",
    "blocks_{i}/attn/query": "encoder.layer.{i}.attention.attention.query",
    "blocks_{i}/attn/key": "encoder.layer.{i}.attention.attention.key",
    "blocks_{i}/attn/value": "encoder.layer.{i}.attention.attention.value",
    "blocks_{i}/attn/out": "encoder.layer.{i}.attention.output.dense",
    "blocks_{i}/norm2": "encoder.layer.{i}.layernorm_after",
    "blocks_{i}/mlp/fc1": "encoder.layer.{i}.intermediate.dense",
    "blocks_{i}/mlp/fc2": "encoder.layer.{i}.output.dense",
}

_AUGREG_ATTENTION = "Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1"
_AUGREG = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed": "embedding",
    "blocks_{i}/norm1": "Transformer/encoderblock_{i}/LayerNorm_0",
    "blocks_{i}/attn/query": f"{_AUGREG_ATTENTION}/query",
    "blocks_{i}/attn/key": f"{_AUGREG_ATTENTION}/key",
    "blocks_{i}/attn/value": f"{_AUGREG_ATTENTION}/value",
    "blocks_{i}/attn/out": f"{_AUGREG_ATTENTION}/out",
    "blocks_{i}/norm2": "Transformer/encoderblock_{i}/LayerNorm_2",
    "blocks_{i}/mlp/fc1": "Transformer/encoderblock_{i}/MlpBlock_3/Dense_0",
    "blocks_{i}/mlp/fc2": "Transformer/encoderblock_{i}/MlpBlock_3/Dense_1",
    "norm": "Transformer/encoder_norm",
    "pre_logits": "pre_logits",
    "head": "head",
}

_HUGGING_FACE = {
    "renames": ((r"^(vit|deit)\.", ""), (r"^cls_classifier\.", "classifier.")),
    "norm_epsilon": 1e-12,
}

LAYOUTS: dict[str, Layout] = {
    "timm": Layout("timm", _TIMM, renames=((r"^module\.", ""),)),
    "released": Layout("released PyTorch code", _RELEASED, renames=((r"^module\.", ""),)),
    "transformers4": Layout("Hugging Face transformers 4", _TRANSFORMERS_4, **_HUGGING_FACE),
    "transformers5": Layout("Hugging Face transformers 5", _TRANSFORMERS_5, **_HUGGING_FACE),
    "augreg": Layout("Google AugReg", _AUGREG, pytorch=False),
}
