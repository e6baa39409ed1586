"""Which parameters a ViT has: from the names of arrays, and from what is stated beside them."""

import functools
from typing import Any

import flax.traverse_util
import jax

from kdgqa_jax import vit
from kdgqa_jax.convert.formats import Arrays
from kdgqa_jax.convert.sources.layout import Layout
from kdgqa_jax.convert.sources.stated import Stated
from kdgqa_jax.errors import UserError
from kdgqa_jax.pools import NORMALISED

# --- parameters ---------------------------------------------------------------------------------


@functools.cache
def _leaves(**structure: Any) -> tuple[str, ...]:
    """The parameter paths of a model of one block."""
    model = vit.create(
        "custom/1", width=1, depth=1, num_heads=1, mlp_width=1, image_size=1, **structure
    )
    shapes = jax.eval_shape(lambda: vit.init_variables(model, jax.random.key(0)))
    return tuple(flax.traverse_util.flatten_dict(shapes["params"], sep="/"))


def parameter_paths(depth: int, **structure: Any) -> list[str]:
    """The paths of all parameters of a model with `depth` blocks and the options of `structure`."""
    paths = []
    for leaf in _leaves(**structure):
        if leaf.startswith("blocks_0/"):
            paths += [f"blocks_{i}/{leaf.removeprefix('blocks_0/')}" for i in range(depth)]
        else:
            paths.append(leaf)
    return paths


_EVERYTHING: dict[str, Any] = {
    "num_classes": 1, "reg_tokens": 1, "pre_norm": True, "embed_norm": True, "layer_scale": 1.0,
    "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "gated_mlp": True,
}  # fmt: skip


def all_paths(depth: int) -> list[str]:
    """The paths that a model of any structure may have."""
    several = (
        {"representation_size": 1, "distillation": "head"}, {"pool": "avg"}, {"pool": "map"},
    )  # fmt: skip
    paths = (path for more in several for path in parameter_paths(depth, **_EVERYTHING, **more))
    return list(dict.fromkeys(paths))


# --- structure ----------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    name: vit.known_options()[name].default
    for name in (
        "reg_tokens", "pre_norm", "embed_norm", "layer_scale", "qk_norm", "scale_attn_norm",
        "scale_mlp_norm", "gated_mlp", "final_norm", "patch_bias", "proj_bias", "mlp_bias", "norm",
        "block", "no_embed_class", "pool_include_prefix",
    )
}  # fmt: skip
"""What a ViT has where neither names nor anything beside the weights say something else: the
defaults of the model."""


def structure_of(layout: Layout, arrays: Arrays, facts: Stated, path: Any) -> dict[str, Any]:
    """The options of `vit.create` that say which parameters there are.

    What names show, unless something is stated: where the two differ, names are then missing or
    left over.

    Raises UserError: shown and stated differ where names would not show it.
    """

    def theirs(ours: str) -> str | None:
        found = layout.theirs(ours)
        return found[0] if found is not None and found[0] in arrays else None

    def has(module: str, leaves: tuple[str, ...] = ("kernel", "scale", "bias")) -> bool:
        return any(theirs(f"{module}/{leaf}") for leaf in leaves)

    numbers = sorted(layout.block_numbers(arrays))

    def any_block(module: str, leaves: tuple[str, ...] = ("kernel", "scale", "bias")) -> bool:
        return any(has(f"blocks_{i}/{module}", leaves) for i in numbers)

    def one_of(name: str) -> bool:
        return any(theirs(f"blocks_{i}/{name}") for i in numbers)

    registers = theirs("reg_token")
    distilled = ("head" if has("head_dist") else "token") if theirs("dist_token") else "none"
    pooled = has("fc_norm") and not has("norm")
    pool = "map" if theirs("attn_pool/latent") else "avg" if pooled else "token"
    shown = {
        "distillation": distilled,
        "reg_tokens": max(arrays[registers].shape[-2:-1], default=1) if registers else 0,
        "pre_norm": has("norm_pre"),
        "embed_norm": has("patch_norm"),
        "layer_scale": 1e-5 if one_of("ls1") or one_of("ls2") else 0.0,
        "qk_norm": any_block("attn/q_norm"),
        "scale_attn_norm": any_block("attn/norm"),
        "scale_mlp_norm": any_block("mlp/norm"),
        "gated_mlp": any_block("mlp/gate"),
        "qkv_bias": any(any_block(f"attn/{x}", ("bias",)) for x in ("query", "key", "value")),
    }
    facts.check(_comparable(shown, facts), path.name)
    if "map" in (pool, facts.get("pool")):
        facts.check({"pool": pool if pool == "map" else "another"}, path.name)
    names = (*PLAIN, "class_token", "pool", "qkv_bias")
    structure = {
        **PLAIN,
        "pool": pool,
        "class_token": theirs("cls_token") is not None or not (pooled or pool == "map"),
        **shown,
        **{name: facts.get(name) for name in names if name in facts.values},
        "num_classes": int(has("head")),
        "representation_size": int(has("pre_logits")),
        **layout.fixed,
    }
    if "norm_pooled" in layout.fixed:
        return structure
    normed = structure["final_norm"] and (has("norm") or has("fc_norm"))
    return structure | _final_norm(structure["pool"], facts, pooled if normed else None)


def _comparable(shown: dict[str, Any], facts: Stated) -> dict[str, Any]:
    """What names show, but for what a source states in another way."""
    if facts.get("distillation") == "token" and shown["distillation"] == "head":
        shown = {**shown, "distillation": "token"}  # the second head is no part of what timm says
    if facts.get("layer_scale") and shown["layer_scale"]:
        shown = {**shown, "layer_scale": facts.get("layer_scale")}  # its initial value is not shown
    return shown


def _final_norm(pool: str, facts: Stated, pooled: bool | None) -> dict[str, Any]:
    """`norm_pooled` where it is not what the pool says.

    Args:
      pool: of the model.
      facts: what is stated.
      pooled: the norm in the weights is of what is pooled; None: there is no norm.
    """
    usual = pool in NORMALISED
    stated = facts.get("norm_pooled", usual) if "pool" in facts.values else pooled
    if pooled not in (None, stated):
        by, _ = facts.values.get("norm_pooled", ("", None))
        also = f" and fc_norm={stated}" if by == "fc_norm" else ""
        names = {True: "fc_norm", False: "norm"}
        raise UserError(
            f"{facts.place}: global_pool={pool!r}{also}, but the final norm in the weights is"
            f" {names[pooled]!r}; with that pool it is {names[stated]!r}"
        )
    return {} if stated in (None, usual) else {"norm_pooled": stated}


def plain(structure: dict[str, Any]) -> dict[str, Any]:
    """The structure without what makes it more than a plain ViT."""
    return {**structure, **PLAIN}


def extras(structure: dict[str, Any]) -> list[str]:
    """The options of a structure that make it more than a plain ViT."""
    named = [f"{name}={structure[name]!r}" for name in PLAIN if structure[name] != PLAIN[name]]
    if structure["pool"] == "map":
        named.append("pool='map'")
    if not structure["class_token"] and not structure["qkv_bias"]:  # as timm's res-post-norm ViT
        named += ["class_token=False", "qkv_bias=False"]
    return named
