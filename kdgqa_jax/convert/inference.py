"""The architecture of a checkpoint, from the names and shapes of its arrays."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from kdgqa_jax import vit
from kdgqa_jax.attention import ALIASES, VARIANTS, variant_name
from kdgqa_jax.convert.files import Source
from kdgqa_jax.convert.layouts import LAYOUTS, Layout
from kdgqa_jax.convert.stated import Stated
from kdgqa_jax.errors import UserError, some

HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Query heads of the ViTs (Ti, S, B, L, H) that have these widths."""

Find = Callable[[str], np.ndarray | None]
"""One of our names -> the array in the file, in our form where the head width is not needed."""


def recognise(source: Source) -> tuple[Layout, dict[str, np.ndarray]]:
    """The layout that a file has, and its arrays by the layout's canonical names.

    Raises UserError: none of `LAYOUTS` has such names.
    """
    best, most = None, 0
    for layout in LAYOUTS.values():
        names = {layout.canonical(name) for name in source.arrays}
        blocks = layout.block_numbers(names)
        known = {found[0] for ours in _paths(len(blocks)) if (found := layout.theirs(ours))}
        if blocks and len(names & known) > most:
            best, most = layout, len(names & known)
    if best is None:
        tried = ", ".join(layout.title for layout in LAYOUTS.values())
        names = some(sorted(source.arrays), 3)
        raise UserError(
            f"{source.path}: unknown layout; tried {tried}; the file holds {names}. A ViT's"
            " state dict in one of those layouts was expected"
        )
    by_canonical: dict[str, list[str]] = {}
    for name in source.arrays:
        by_canonical.setdefault(best.canonical(name), []).append(name)
    twice = [" and ".join(names) for names in by_canonical.values() if len(names) > 1]
    if twice:
        raise UserError(
            f"{source.path}: holds arrays of one parameter under two names: {some(twice, 4)}; save"
            " the model that is meant alone"
        )
    return best, {best.canonical(name): x for name, x in source.arrays.items()}


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


def _paths(depth: int) -> list[str]:
    """The paths that a model of any structure may have."""
    plain = parameter_paths(depth, num_classes=1, representation_size=1, distillation="head")
    average = parameter_paths(depth, num_classes=1, pool="avg")
    return list(dict.fromkeys([*plain, *average]))


def structure_of(layout: Layout, names: set[str]) -> dict[str, Any]:
    """The options of `vit.create` that say which parameters there are, from their names alone."""

    def has(module: str, leaves: tuple[str, ...] = ("kernel", "scale", "bias")) -> bool:
        found = [layout.theirs(f"{module}/{leaf}") for leaf in leaves]
        return any(f is not None and f[0] in names for f in found)

    def has_array(ours: str) -> bool:
        found = layout.theirs(ours)
        return found is not None and found[0] in names

    average = has("fc_norm") and not has("norm")
    projections = [
        f"blocks_{i}/attn/{name}"
        for i in layout.block_numbers(names)
        for name in ("query", "key", "value")
    ]
    distillation = "none"
    if has_array("dist_token"):
        distillation = "head" if has("head_dist") else "token"
    return {
        "pool": "avg" if average else "token",
        "class_token": has_array("cls_token") or not average,
        "qkv_bias": any(has(projection, ("bias",)) for projection in projections),
        "distillation": distillation,
        "num_classes": int(has("head")),
        "representation_size": int(has("pre_logits")),
    }


def arguments_of(
    source: Source,
    layout: Layout,
    structure: dict[str, Any],
    told: Stated,
    find: Find,
    num_heads: int | None,
) -> tuple[dict[str, Any], int, list[str]]:
    """(arguments of `vit.create`, number of image channels, notes) for the model in a file.

    Args:
      source: the file.
      layout: its layout.
      structure: from `structure_of`.
      told: from `stated.stated`.
      find: gives arrays by our names.
      num_heads: N; None: from what lies beside the weights, else `HEADS_BY_WIDTH`.

    Raises:
      UserError: shapes that no ViT has, another model than is stated beside the weights, or a
        number of heads that is not known.
    """

    def shape(ours: str, rank: int) -> tuple[int, ...]:
        array = find(ours)
        if array is None or array.ndim != rank or not array.size:
            what = "missing" if array is None else f"of shape {array.shape}"
            raise UserError(
                f"{source.path}: {layout.theirs(ours)[0]} is {what}, so the architecture cannot be"
                f" told; expected {rank} axes"
            )
        return array.shape

    patch_height, patch_size, channels, width = shape("patch_embed/kernel", 4)
    if patch_height != patch_size:
        raise UserError(f"{source.path}: patches of {patch_height}x{patch_size} are not square")
    fields = {
        "width": width,
        "depth": len(layout.block_numbers(set(map(layout.canonical, source.arrays)))),
        "mlp_width": shape("blocks_0/mlp/fc1/kernel", 2)[1],
    }
    options = {
        **structure,
        "num_classes": shape("head/kernel", 2)[1] if structure["num_classes"] else 0,
        "representation_size": shape("pre_logits/kernel", 2)[1]
        if structure["representation_size"]
        else 0,
    }
    _check_pool(told, structure["pool"])
    told.check({**fields, **options, "patch_size": patch_size, "channels": channels}, source)

    query, key = shape_of_heads(find, "query"), shape_of_heads(find, "key")
    num_heads, notes = _heads(source, told, width, query, num_heads)
    if num_heads < 1 or width % num_heads:
        raise UserError(f"{source.path}: width {width} is not a multiple of {num_heads} heads")
    head_width = width // num_heads
    if math.prod(query[1:]) != width or math.prod(key[1:]) % head_width:
        raise UserError(
            f"{source.path}: query and key projections to {math.prod(query[1:])} and"
            f" {math.prod(key[1:])} do not fit {num_heads} query heads of width {head_width}"
        )
    num_kv_heads = max(math.prod(key[1:]) // head_width, 1)
    prefix = structure["class_token"] + (structure["distillation"] != "none")
    grid = _grid(source, told, shape("pos_embed", 3)[1] - prefix, patch_size)
    height, side = (n * patch_size for n in grid)
    fields["num_heads"] = num_heads
    if options["qkv_bias"]:  # the default
        del options["qkv_bias"]
    known = [size for size, numbers in vit.SIZES.items() if numbers == fields]
    arguments = {
        "name": f"{known[0] if known else 'custom'}/{patch_size}",
        **({} if known else fields),
        **options,
        "image_size": height if height == side else (height, side),
        "norm_epsilon": told.get("norm_epsilon", layout.norm_epsilon),
        "num_kv_heads": num_kv_heads,
    }
    return arguments, channels, notes


def shape_of_heads(find: Find, projection: str) -> tuple[int, ...]:
    """The shape of a projection of the first block, (D, heads * H) or (D, heads, H)."""
    array = find(f"blocks_0/attn/{projection}/kernel")
    return (0,) if array is None else array.shape


def _check_pool(told: Stated, found: str) -> None:
    """Raise UserError where the final norm is not where a stated pooling has it here."""
    pool = told.get("pool", found)
    if pool != found:
        norm = {"avg": "fc_norm, after the mean", "token": "norm, before the class token is taken"}
        raise UserError(
            f"{told.place}: global_pool={pool!r}, but the final norm in the weights is"
            f" {norm[found].split(',')[0]!r}; the model here has {norm[pool]}"
        )


def _heads(
    source: Source, told: Stated, width: int, query: tuple[int, ...], asked: int | None
) -> tuple[int, list[str]]:
    """(N, notes): as the source states it; else as asked for, else by `HEADS_BY_WIDTH`."""
    stated = None
    if len(query) == 3:  # the file has the heads as an axis
        stated = query[1]
    elif told.heads_of in (None, width):
        stated = told.get("num_heads")
    if stated is not None and asked not in (None, stated):
        raise UserError(
            f"{source.path} has {stated} query heads, not {asked}; leave it to the file"
        )
    if stated is not None or asked is not None:
        return asked if stated is None else stated, []
    if width in HEADS_BY_WIDTH:
        guess = HEADS_BY_WIDTH[width]
        return guess, [f"{guess} query heads guessed from the width {width}: --num-heads"]
    known = ", ".join(f"{n} for {w}" for w, n in HEADS_BY_WIDTH.items())
    raise UserError(
        f"{source.path}: how many query heads a model of width {width} has cannot be told (known:"
        f" {known}); give --num-heads"
    )


def _grid(source: Source, told: Stated, length: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of the patches whose position embeddings number `length`."""
    size = told.get("image_size")
    if size is not None:
        grid = tuple(side // patch_size for side in size)
        if grid[0] * grid[1] != length or any(side % patch_size for side in size):
            shown = size[0] if size[0] == size[1] else "x".join(map(str, size))
            raise UserError(
                f"{source.path}: a position embedding for {length} patches of {patch_size} px does"
                f" not fit the image size {shown} that {told.place} states"
            )
        return grid
    side = math.isqrt(max(length, 0))
    if side < 1 or side * side != length:
        raise UserError(
            f"{source.path}: a position embedding for {length} patches is not that of a square"
            " image, and nothing beside the weights tells the image size (config.json: image_size)"
        )
    return side, side


def attention_of(source: Source, num_heads: int, num_kv_heads: int) -> tuple[str | None, str]:
    """(the variant that a file holds, how that is known); None where its contents leave it open.

    Weights of `gqa`, `kdgqa` and `pgqa` look alike: there the name of the file decides, if it holds
    the name of a variant.
    """
    if "attention" in source.metadata.get("model", {}):
        return variant_name(source.metadata["model"]["attention"]), "the file says it"
    layout, stem = LAYOUTS["released"], source.path.stem.lower()
    cache, _ = layout.theirs("blocks_0/attn/key_norm")
    if any(layout.canonical(name) == cache for name in source.arrays):
        variant = "dgqa_diff" if "diff" in stem else "dgqa_ema"
        return variant, "the file holds a cache of norms, and its name tells of which rule"
    named = [v for v in (*VARIANTS, *ALIASES) if re.search(rf"(?<![a-z]){v}(?![a-z])", stem)]
    plain = len(named) == 1 and variant_name(named[0]) == "mha"
    query, _ = layout.theirs("blocks_0/attn/query/kernel")
    apart = any(layout.canonical(name) == query for name in source.arrays)
    equal = num_kv_heads == num_heads  # which any variant may have, but not under timm's names
    if len(named) == 1 and (plain == equal or (apart and not plain)):
        return variant_name(named[0]), "by the name of the file"
    if num_kv_heads == num_heads:
        return "mha", "as many key/value heads as query heads"
    return None, ""
