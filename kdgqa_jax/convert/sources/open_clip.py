"""The visual tower of OpenCLIP and of OpenAI's CLIP, alone or out of the model of two towers."""

from typing import Any

from kdgqa_jax.convert.sources.layout import Bench, Layout, bias_free_head, numbered
from kdgqa_jax.convert.sources.stated import Stated, Values, checked
from kdgqa_jax.errors import UserError, one_line

CONFIG_FILE = "open_clip_config.json"
_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed": "conv1",
    "norm_pre": "ln_pre",
    **numbered("transformer.resblocks.{i}", {
        "norm1": "ln_1", "norm2": "ln_2", "ls1": "ls_1.gamma", "ls2": "ls_2.gamma",
        "attn/query": "attn.in_proj#0/3", "attn/key": "attn.in_proj#1/3",
        "attn/value": "attn.in_proj#2/3", "attn/out": "attn.out_proj",
        "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj",
    }),
    "norm": "ln_post",
    "head": "head",
}  # fmt: skip
_RENAMES = (
    (r"^module\.", ""),
    (r"\.in_proj_(weight|bias)$", r".in_proj.\1"),
)
_VALUES = {"width": "width", "layers": "depth", "patch_size": "patch_size",
           "image_size": "image_size"}  # fmt: skip
_NOT_HERE = (
    "timm_model_name", "attentional_pool", "no_ln_pre", "norm_kwargs", "act_kwargs", "block_type",
    "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc",
    "pos_embed_type",
)  # fmt: skip


def _surgery(bench: Bench) -> None:
    names = list(bench.arrays)
    if any(name.startswith("visual.") for name in names):  # the other tower has names as this one
        for name in names:
            if not name.startswith("visual."):
                bench.arrays[f"text:{name}"] = bench.arrays.pop(name)
        for name in names:
            if name.startswith("visual."):
                array = bench.arrays.pop(name)
                bench.put(name.removeprefix("visual."), array, name, "")
    for name, rank in (("positional_embedding", 2), ("class_embedding", 1)):
        array = bench.get(name, rank)
        if array is not None:
            bench.put(name, array.reshape((1,) * (3 - rank) + array.shape), name, "")
    bias_free_head(bench, "proj", "head", transposed=True)


def _stated(config: dict[str, Any], place: str) -> Stated:
    """What open_clip_config.json says."""
    if not config:
        return Stated(place, {})
    model = config.get("model_cfg", config)
    tower = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(tower, dict):
        raise UserError(f"{place}: has no model_cfg with a vision_cfg, as OpenCLIP writes them")
    for name in _NOT_HERE:
        if tower.get(name) not in (None, False, "learnable"):
            raise UserError(
                f"{place}: {name}={one_line(repr(tower[name]), 60)} is another visual tower"
            )
    values: Values = {o: (t, tower[t]) for t, o in _VALUES.items() if tower.get(t) is not None}
    quick = model.get("quick_gelu", False)
    values["activation"] = ("quick_gelu", "quick_gelu" if quick else "gelu")
    width, head_width = tower.get("width", 768), tower.get("head_width", 64)
    if type(width) is int and type(head_width) is int and head_width > 0:
        values["num_heads"] = ("head_width", width // head_width)
    if tower.get("pool_type") not in (None, "tok"):
        raise UserError(f"{place}: pool_type={one_line(repr(tower['pool_type']), 60)}; not 'tok'")
    return checked(place, values)


LAYOUTS = {
    "open_clip": Layout(
        "OpenCLIP", _NAMES, renames=_RENAMES, surgery=_surgery, stated=_stated,
        ignored=(r"text:.*",), config_file=CONFIG_FILE,
        fixed={"pre_norm": True, "patch_bias": False},
        needs=("activation",), defaults={"norm_epsilon": 1e-5}, resize="timm",
    )
}  # fmt: skip
