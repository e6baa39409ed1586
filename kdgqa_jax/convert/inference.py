"""The architecture of a checkpoint, from names and shapes of arrays and what lies beside them."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kdgqa_jax import vit
from kdgqa_jax.attention import ALIASES, VARIANTS, variant_name
from kdgqa_jax.convert.files import Source
from kdgqa_jax.convert.sources import LAYOUTS, timm
from kdgqa_jax.convert.sources.layout import Bench, Layout
from kdgqa_jax.convert.sources.stated import Stated, of_metadata
from kdgqa_jax.convert.structure import PLAIN, all_paths
from kdgqa_jax.errors import UserError, some

HEADS_BY_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Query heads of the ViTs (Ti, S, B, L, H) that have these widths."""

Find = Callable[[str], np.ndarray | None]
"""One of our names -> the array in the file, in our form where the head width is not needed."""


# --- names --------------------------------------------------------------------------------------


def recognise(source: Source) -> tuple[Layout, Bench]:
    """The layout that a file has, and its arrays by the layout's canonical names.

    Raises UserError: none of `LAYOUTS` has such names.
    """
    best, most, found = None, 0, None
    for layout in LAYOUTS.values():
        bench = layout.bench(source.arrays)
        blocks = layout.block_numbers(bench.arrays)
        known = {place[0] for ours in all_paths(len(blocks)) if (place := layout.theirs(ours))}
        count = sum(name in known or layout.ignores(name) for name in bench.arrays)
        if blocks and count > most:
            best, most, found = layout, count, bench
    if best is None:
        if timm.is_timm(source.config):  # which may say what is unusual about it
            timm.stated(source.config, str(source.path.parent / "config.json"))
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
    return best, found


# --- what is said -------------------------------------------------------------------------------


def stated(
    source: Source, layout: Layout, config: dict[str, Any], arch: str | None = None
) -> Stated:
    """What is stated beside the weights, checked by its kind.

    Our own metadata says everything, and a config.json beside such a file is not looked at.

    Args:
      source: the file.
      layout: of its names.
      config: what `layout.config_file` beside it holds.
      arch: the name of an architecture of timm; only for weights that nothing lies beside.

    Raises:
      UserError: of another kind than expected, or an architecture that is not the one here.
    """
    place = str(source.path.parent / layout.config_file)
    if arch is not None and (source.metadata or config.keys() & _SAYS_ARCHITECTURE):
        by = f"the header of {source.path}" if source.metadata else place
        raise UserError(f"--arch {arch}: {by} says what the model is; leave --arch out")
    if source.metadata:
        return of_metadata(source.metadata, source.path)
    return layout.stated(config, place) if arch is None else timm.of_architecture(arch)


_SAYS_ARCHITECTURE = {"architecture", "model_type", "model_cfg"}


# --- arguments ----------------------------------------------------------------------------------


def arguments_of(
    source: Source,
    layout: Layout,
    structure: dict[str, Any],
    facts: Stated,
    find: Find,
    depth: int,
    num_heads: int | None,
) -> tuple[dict[str, Any], int, list[str]]:
    """(arguments of `vit.create`, number of image channels, notes) for the model in a file.

    Args:
      source: the file.
      layout: its layout.
      structure: from `structure_of`.
      facts: from `stated`.
      find: gives arrays by our names.
      depth: L.
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
                f" determined; expected {rank} axes"
            )
        return array.shape

    patch_height, patch_size, channels, width = shape("patch_embed/kernel", 4)
    if patch_height != patch_size:
        raise UserError(f"{source.path}: patches of {patch_height}x{patch_size} are not square")
    fields = {"width": width, "depth": depth, "mlp_width": shape("blocks_0/mlp/fc1/kernel", 2)[1]}
    options = {
        **structure,
        "num_classes": shape("head/kernel", 2)[1] if structure["num_classes"] else 0,
        "representation_size": shape("pre_logits/kernel", 2)[1]
        if structure["representation_size"]
        else 0,
    }
    sizes = ("num_classes", "representation_size")
    found = {**fields, **{n: options[n] for n in sizes}}
    facts.check({**found, "patch_size": patch_size, "channels": channels}, source.path.name)

    query, key = shape_of_heads(find, "query"), shape_of_heads(find, "key")
    num_heads, notes = _heads(source, facts, width, query, num_heads)
    head_width = facts.get("head_width")
    if num_heads < 1 or (head_width is None and width % num_heads):
        raise UserError(f"{source.path}: width {width} is not a multiple of {num_heads} heads")
    head_width = head_width or width // num_heads
    if math.prod(query[1:]) != num_heads * head_width or math.prod(key[1:]) % head_width:
        raise UserError(
            f"{source.path}: query and key projections to {math.prod(query[1:])} and"
            f" {math.prod(key[1:])} do not fit {num_heads} query heads of width {head_width}"
        )
    num_kv_heads = max(math.prod(key[1:]) // head_width, 1)
    prefix = options["class_token"] + (options["distillation"] != "none") + options["reg_tokens"]
    length = shape("pos_embed", 3)[1]
    if options["reg_tokens"] and "no_embed_class" not in facts.values:
        options["no_embed_class"] = not _square(length - prefix) and _square(length)
    length -= 0 if options["no_embed_class"] else prefix
    grid = _grid(source, facts, length, patch_size)
    height, side = (n * patch_size for n in grid)
    fields["num_heads"] = num_heads
    widths = ("head_width", "v_head_width")
    options |= {name: facts.get(name) for name in widths if name in facts.values}
    known = [size for size, numbers in vit.SIZES.items() if numbers == fields]
    hidden = {**layout.defaults, **(layout.gated_defaults if options["gated_mlp"] else {})}
    if "activation" in facts.values:
        hidden["activation"] = facts.get("activation")
    defaults = vit.known_options()
    unchanged = {name for name, x in PLAIN.items() if options.get(name) == x}
    if options["qkv_bias"]:  # the default
        unchanged.add("qkv_bias")
    arguments = {
        "name": f"{known[0] if known else 'custom'}/{patch_size}",
        **({} if known else fields),
        **{name: x for name, x in options.items() if name not in unchanged},
        **{name: x for name, x in hidden.items() if x != defaults[name].default},
        "image_size": height if height == side else (height, side),
        "norm_epsilon": facts.get("norm_epsilon", layout.defaults["norm_epsilon"]),
        "num_kv_heads": num_kv_heads,
    }
    return arguments, channels, notes


def _square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def shape_of_heads(find: Find, projection: str) -> tuple[int, ...]:
    """The shape of a projection of the first block, (D, heads * H) or (D, heads, H)."""
    array = find(f"blocks_0/attn/{projection}/kernel")
    return (0,) if array is None else array.shape


def _heads(
    source: Source, facts: Stated, width: int, query: tuple[int, ...], asked: int | None
) -> tuple[int, list[str]]:
    """(N, notes): as the source states it; else as asked for, else by `HEADS_BY_WIDTH`."""
    stated = None
    if len(query) == 3:  # the file has the heads as an axis
        stated = query[1]
    elif facts.heads_of in (None, width):
        stated = facts.get("num_heads")
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
        f"{source.path}: how many query heads a model of width {width} has is not known (known:"
        f" {known}); give --num-heads"
    )


def _grid(source: Source, facts: Stated, length: int, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of the patches whose position embeddings number `length`."""
    size = facts.get("image_size")
    if size is not None:
        grid = tuple(side // patch_size for side in size)
        if grid[0] * grid[1] != length or any(side % patch_size for side in size):
            shown = size[0] if size[0] == size[1] else "x".join(map(str, size))
            raise UserError(
                f"{source.path}: a position embedding for {length} patches of {patch_size} px does"
                f" not fit the image size {shown} that {facts.place} states"
            )
        return grid
    side = math.isqrt(max(length, 0))
    if side < 1 or side * side != length:
        raise UserError(
            f"{source.path}: a position embedding for {length} patches is not that of a square"
            " image, and nothing beside the weights gives the image size (config.json: image_size)"
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
        return variant, "the file holds a cache of norms, and its name says of which rule"
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
