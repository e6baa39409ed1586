"""timm's ViT and DeiT: names, fused arrays, and what its config.json says of a model.

timm builds a model from its `architecture`, changed by `model_args` and, for what those leave open,
by `pretrained_cfg`. Many architectures have the same parameter names and compute different things.
"""

import re
from typing import Any

import numpy as np

from kdgqa_jax.convert.formats import Arrays
from kdgqa_jax.convert.sources import hugging_face_config, timm_architectures
from kdgqa_jax.convert.sources.layout import Bench, Layout, numbered
from kdgqa_jax.convert.sources.stated import Stated, Values, checked
from kdgqa_jax.errors import LARGEST, UserError, one_line
from kdgqa_jax.pools import NORMALISED, POOLS

# --- names and arrays ---------------------------------------------------------------------------

_MLP = {"mlp/fc1": "mlp.fc1", "mlp/gate": "mlp.fc1_g", "mlp/fc2": "mlp.fc2", "mlp/norm": "mlp.norm"}
NAMES = {
    "cls_token": "cls_token",
    "dist_token": "dist_token",
    "reg_token": "reg_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj",
    "patch_norm": "patch_embed.norm",
    "norm_pre": "norm_pre",
    **numbered("blocks.{i}", {
        "norm1": "norm1", "norm2": "norm2", "ls1": "ls1.gamma", "ls2": "ls2.gamma",
        "attn/query": "attn.qkv#0/3", "attn/key": "attn.qkv#1/3", "attn/value": "attn.qkv#2/3",
        "attn/q_norm": "attn.q_norm", "attn/k_norm": "attn.k_norm", "attn/norm": "attn.norm",
        "attn/out": "attn.proj", **_MLP,
    }),
    "norm": "norm",
    "fc_norm": "fc_norm",
    "attn_pool/latent": "attn_pool.latent",
    "attn_pool/query": "attn_pool.q",
    "attn_pool/key": "attn_pool.kv#0/2",
    "attn_pool/value": "attn_pool.kv#1/2",
    "attn_pool/out": "attn_pool.proj",
    "attn_pool/norm": "attn_pool.norm",
    "attn_pool/mlp/fc1": "attn_pool.mlp.fc1",
    "attn_pool/mlp/fc2": "attn_pool.mlp.fc2",
    "pre_logits": "pre_logits.fc",
    "head": "head",
    "head_dist": "head_dist",
}  # fmt: skip

_PARALLEL = (  # ParallelScalingBlock
    (r"^(blocks\.\d+)\.in_norm\.", r"\1.norm1."),
    (r"^(blocks\.\d+)\.([qk]_norm)\.", r"\1.attn.\2."),
    (r"^(blocks\.\d+)\.attn_out_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.mlp_out_proj\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.ls\.", r"\1.ls1."),
    (r"^(blocks\.\d+)\.mlp_bias$", r"\1.mlp.fc1.bias"),
)
RENAMES = ((r"^module\.", ""), (r"\.fc1_x\.", ".fc1."), *_PARALLEL)


def split_in_proj(bench: Bench) -> None:
    """The projection of a parallel block -> first layer of its MLP, and fused qkv."""
    for match in bench.matches(r"(blocks\.\d+)\.in_proj\.(weight|bias)"):
        name, block, leaf = match[0], match[1], match[2]
        array, norm = bench.arrays[name], bench.get(f"{block}.norm1.weight", 1)
        width = 0 if norm is None else len(norm)
        if width and array.ndim and len(array) > 3 * width:
            mlp, qkv = np.split(array, [len(array) - 3 * width])
            del bench.arrays[name]
            bench.put(f"{block}.mlp.fc1.{leaf}", mlp, name, "rows of the MLP")
            bench.put(f"{block}.attn.qkv.{leaf}", qkv, name, "rows of the attention")


def split_gate(bench: Bench, packed: str = "fc1", last: str = "fc2") -> None:
    """A gate and the layer that it gates in one array (SwiGLU) -> two."""
    for match in bench.matches(rf"(blocks\.\d+\.mlp)\.{packed}\.weight"):
        mlp = match[1]
        first, second = bench.get(match[0], 2), bench.get(f"{mlp}.{last}.weight", 2)
        if first is None or second is None or len(first) != 2 * second.shape[1]:
            continue
        for leaf in ("weight", "bias"):
            array = bench.arrays.get(f"{mlp}.{packed}.{leaf}")
            if array is not None and array.ndim and len(array) == len(first):
                gate, hidden = np.split(array, 2)
                del bench.arrays[f"{mlp}.{packed}.{leaf}"]
                bench.put(f"{mlp}.fc1_g.{leaf}", gate, f"{mlp}.{packed}.{leaf}", "first half")
                bench.put(f"{mlp}.fc1.{leaf}", hidden, f"{mlp}.{packed}.{leaf}", "second half")


def _surgery(bench: Bench) -> None:
    split_in_proj(bench)
    split_gate(bench)


def _closing(arrays: Arrays) -> Arrays:
    """Names of `NAMES` -> those of timm's SwiGLU and ParallelScalingBlock.

    Raises UserError: a parallel block with what timm's does not have.
    """
    for gate in [name for name in arrays if re.fullmatch(r"blocks\.\d+\.mlp\.fc1_g\..*", name)]:
        hidden = gate.replace(".fc1_g.", ".fc1.")
        arrays[gate.replace(".fc1_g.", ".fc1_x.")] = arrays.pop(hidden)
    for name in [name for name in arrays if re.fullmatch(r"blocks\.\d+\.norm1\.weight", name)]:
        block = name.removesuffix(".norm1.weight")
        if f"{block}.norm2.weight" not in arrays:
            _close_parallel(arrays, block)
    return arrays


def _close_parallel(arrays: Arrays, block: str) -> None:
    mlp, qkv = f"{block}.mlp.fc1", f"{block}.attn.qkv"
    other = [f"{mlp}_x.weight", f"{block}.attn.norm.weight", f"{block}.mlp.norm.weight"]
    biases = (f"{mlp}.bias" in arrays, f"{qkv}.bias" in arrays)
    out = {f"{block}.{name}.bias" in arrays for name in ("attn.proj", "mlp.fc2")}
    if not arrays.keys().isdisjoint(other) or biases[0] is False or len(out) > 1:
        raise UserError(
            "timm's parallel block has no place for a gate, norms within attention and MLP or"
            " biases of one of the two; use layout 'released'"
        )
    parts = [arrays.pop(f"{mlp}.weight"), arrays.pop(f"{qkv}.weight")]
    arrays[f"{block}.in_proj.weight"] = np.concatenate(parts)
    bias = arrays.pop(f"{mlp}.bias")
    if biases[1]:
        bias = np.concatenate([bias, arrays.pop(f"{qkv}.bias")])
    arrays[f"{block}.in_proj.bias" if biases[1] else f"{block}.mlp_bias"] = bias
    for name in [name for name in arrays if name.startswith(f"{block}.")]:
        for ours, theirs in (
            ("norm1.", "in_norm."), ("attn.q_norm.", "q_norm."), ("attn.k_norm.", "k_norm."),
            ("attn.proj.", "attn_out_proj."), ("mlp.fc2.", "mlp_out_proj."), ("ls1.", "ls."),
        ):  # fmt: skip
            if name.startswith(f"{block}.{ours}"):
                arrays[name.replace(f"{block}.{ours}", f"{block}.{theirs}")] = arrays.pop(name)


# --- config.json --------------------------------------------------------------------------------

_NO_MATTER = (  # of training, of initial weights, or of images of another size
    r"drop_rate|(pos|patch|proj|attn)_drop_rate|drop_path_rate|weight_init|fix_init"
    r"|dynamic_img_size|dynamic_img_pad|strict_img_size|pretrained.*|out_indices"
)

_AS_HERE: dict[str, tuple[Any, ...]] = {
    "pos_embed": ("learn",),
    "attn_layer": ("", "attn"),
    "use_naflex": (False,),
}
"""Arguments of timm's VisionTransformer of which other values are not computed here."""

_VALUES = {
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "num_heads",
    "patch_size": "patch_size",
    "img_size": "image_size",
    "in_chans": "channels",
    "num_classes": "num_classes",
    "qkv_bias": "qkv_bias",
    "proj_bias": "proj_bias",
    "class_token": "class_token",
    "reg_tokens": "reg_tokens",
    "no_embed_class": "no_embed_class",
    "pre_norm": "pre_norm",
    "final_norm": "final_norm",
    "qk_norm": "qk_norm",
    "scale_attn_norm": "scale_attn_norm",
    "scale_mlp_norm": "scale_mlp_norm",
    "pool_include_prefix": "pool_include_prefix",
    "norm_eps": "norm_epsilon",
}
"""Arguments of timm's VisionTransformer, and what they are here where values are alike."""

_DEFAULTS: dict[str, Any] = {
    "global_pool": "token", "fc_norm": None, "qkv_bias": True, "proj_bias": True,
    "class_token": True, "reg_tokens": 0, "no_embed_class": False, "pre_norm": False,
    "final_norm": True, "qk_norm": False, "scale_attn_norm": False, "scale_mlp_norm": False,
    "pool_include_prefix": False, "init_values": None, "act_layer": "gelu",
    "norm_layer": "layernorm", "norm_eps": 1e-6, "block_fn": "Block", "mlp_layer": "Mlp",
    "embed_norm_layer": None, "distilled": False,
}  # fmt: skip
"""timm's own, of the arguments that decide what is computed."""

_NAMED: dict[str, dict[str, tuple[str, Any]]] = {
    "act_layer": {
        name: ("activation", name) for name in ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
    },
    "norm_layer": {name: ("norm", name) for name in ("layernorm", "rmsnorm")},
    "block_fn": {
        "Block": ("block", "pre_norm"),
        "ResPostBlock": ("block", "post_norm"),
        "ParallelScalingBlock": ("block", "parallel"),
    },
    "mlp_layer": {
        "Mlp": ("gated_mlp", False),
        "GluMlp": ("gated_mlp", True),
        "SwiGLU": ("gated_mlp", True),
    },
}
"""Arguments that are names of layers: (our option, its value)."""

_TRANSLATED = {"global_pool", "fc_norm", "mlp_ratio", "init_values", "embed_norm_layer",
               "distilled", *_VALUES, *_NAMED}  # fmt: skip


def is_timm(config: dict[str, Any]) -> bool:
    """If a config.json is one that timm wrote."""
    return not config.keys().isdisjoint({"architecture", "pretrained_cfg", "model_args"})


def stated(config: dict[str, Any], place: str) -> Stated:
    """What a config.json says of a model with timm's names: timm's, or one of transformers.

    Raises UserError: something that is not computed here, by its name.
    """
    if not is_timm(config):
        return hugging_face_config.stated(config, place)
    name = config.get("architecture")
    own = _section(config, "model_args", place)
    pretrained = pretrained_cfg(config, place)
    found = {} if name is None else timm_architectures.arguments(name, place)
    for argument, value in own.items():
        _check_argument(argument, value, place)
    values: Values = {}
    size = pretrained.get("input_size")
    if size is not None:
        if not isinstance(size, list) or len(size) != 3:
            raise UserError(f"{place}: input_size={_shown(size)} must be [channels, height, width]")
        values |= {"channels": ("input_size", size[0]), "image_size": ("input_size", size[1:])}
    for section in (pretrained, config):
        if section.get("num_classes") is not None:
            values["num_classes"] = ("num_classes", section["num_classes"])
    arguments = {**found, **{name: value for name, value in own.items() if value is not None}}
    pool = _pool((own, config, pretrained), place)
    if pool is not None:
        arguments["global_pool"] = pool
    return _stated(place, arguments, values, found, own, complete=name is not None)


def of_architecture(name: str) -> Stated:
    """What `--arch NAME` says. Raises UserError: an architecture that is not known."""
    place = "--arch"
    found = timm_architectures.arguments(name, place)
    return _stated(place, found, {}, found, {}, complete=True)


def _stated(
    place: str,
    arguments: dict[str, Any],
    values: Values,
    found: dict[str, Any],
    own: dict[str, Any],
    complete: bool,
) -> Stated:
    """`Stated` of arguments; `found` are those of the architecture, `own` the config's."""
    arguments = {**_DEFAULTS, **arguments} if complete else arguments
    if own.get("embed_dim") is None:  # the weights may be of another width than the name says
        arguments = {name: x for name, x in arguments.items() if name != "embed_dim"}
    values = values | _translated(arguments, place)
    if own.get("num_heads") is None and "num_heads" in values:
        values["num_heads"] = ("architecture", values["num_heads"][1])
    ratio = own.get("mlp_ratio")
    if ratio is not None:
        width = _mlp_width(ratio, own.get("embed_dim", found.get("embed_dim")), place)
        width //= 2 if arguments.get("mlp_layer") == "GluMlp" else 1
        values["mlp_width"] = ("mlp_ratio", width)
    free = own.get("embed_dim") is None and own.get("num_heads") is None
    heads_of = found.get("embed_dim") if free else None
    return checked(place, values, heads_of=heads_of, complete=complete)


def _translated(arguments: dict[str, Any], place: str) -> Values:
    """Arguments of timm's VisionTransformer as options here."""
    values = {_VALUES[n]: (n, x) for n, x in arguments.items() if n in _VALUES}
    for argument, table in _NAMED.items():
        if argument in arguments:
            name = arguments[argument]
            if not isinstance(name, str) or name not in table:
                raise UserError(
                    f"{place}: model_args {argument}={_shown(name)} changes what the model computes"
                    f" and is not known; here it is one of {', '.join(table)}"
                )
            ours, value = table[name]
            values[ours] = (argument, value)
    if "global_pool" in arguments:
        pool, fc_norm = arguments["global_pool"], arguments.get("fc_norm")
        values["pool"] = ("global_pool", pool)
        pooled = pool in NORMALISED if fc_norm is None else fc_norm
        values["norm_pooled"] = ("global_pool" if fc_norm is None else "fc_norm", pooled)
    elif arguments.get("fc_norm") is not None:
        values["norm_pooled"] = ("fc_norm", arguments["fc_norm"])
    if "init_values" in arguments:
        scale = arguments["init_values"]
        if arguments.get("block_fn") == "ResPostBlock":  # there it begins the norms
            scale = 0.0
        values["layer_scale"] = ("init_values", 0.0 if scale is None else scale)
    if "embed_norm_layer" in arguments:
        values["embed_norm"] = ("embed_norm_layer", arguments["embed_norm_layer"] is not None)
    if "pre_norm" in arguments:
        values["patch_bias"] = ("pre_norm", arguments["pre_norm"] is False)
    if "proj_bias" in arguments:
        values["mlp_bias"] = ("proj_bias", arguments["proj_bias"])
    if arguments.get("distilled"):
        values["distillation"] = ("architecture", "token")  # or "head", as the weights have one
    return values


def pretrained_cfg(config: dict[str, Any], place: str) -> dict[str, Any]:
    """The section `pretrained_cfg`, which in old files is the whole of it."""
    return _section(config, "pretrained_cfg", place) if "pretrained_cfg" in config else config


def _section(config: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    section = config.get(name)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{place}: {name}={_shown(section)} must be a JSON object")
    return section or {}


def _mlp_width(ratio: Any, width: Any, place: str) -> int:
    """The width that timm gives the MLP."""
    if all(type(x) in (int, float) and 0 < x < LARGEST for x in (ratio, width)):
        return int(width * ratio)
    raise UserError(f"{place}: mlp_ratio={_shown(ratio)} must be a number, of a known embed_dim")


def _check_argument(name: str, value: Any, place: str) -> None:
    if value is None or name in _TRANSLATED or re.fullmatch(_NO_MATTER, name):
        return
    known = _AS_HERE.get(name, ())
    if not any(value is k or (value == k and type(value) is type(k)) for k in known):
        here = f"; here it is {' or '.join(map(repr, known))}" if known else ""
        raise UserError(
            f"{place}: model_args {one_line(name, 60)}={_shown(value)} changes what the model"
            f" computes and is not known{here}"
        )


def _pool(places: tuple[dict[str, Any], ...], place: str) -> Any:
    """The pool that a config.json states, wherever it does; None: nowhere."""
    pools = [p["global_pool"] for p in places if p.get("global_pool") is not None]
    if any(pool != pools[0] for pool in pools):
        raise UserError(f"{place}: global_pool is {' and '.join(map(_shown, pools))} in one file")
    pool = (pools or [None])[0]
    if pool is not None and (not isinstance(pool, str) or pool not in POOLS):
        raise UserError(
            f"{place}: global_pool={_shown(pool)}; the model here pools by one of"
            f" {', '.join(map(repr, POOLS))}"
        )
    return pool


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)


TIMM = Layout(
    "timm", NAMES, renames=RENAMES, surgery=_surgery, closing=_closing, stated=stated,
    defaults={"norm_epsilon": 1e-6}, only_plain=True,
)  # fmt: skip

LAYOUTS = {"timm": TIMM}
