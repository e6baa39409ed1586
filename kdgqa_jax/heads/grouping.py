"""Fewer or narrower key/value heads for a whole model, and refitted, with a report.

Checkpoints of any source and the models of a study go through `group_heads` alike.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdgqa_jax import analysis, tree_utils, vit
from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.heads.calibration import layer_moments
from kdgqa_jax.heads.forecast import discarded, forecast
from kdgqa_jax.heads.merging import Merged, not_linear
from kdgqa_jax.heads.merging_rules import MERGING, NARROWING
from kdgqa_jax.heads.merging_vit import one_per_query_head, to_merged
from kdgqa_jax.heads.moments import InputMoments, data_free_by_layer
from kdgqa_jax.heads.pooling import POOLING, check_groups, to_grouped
from kdgqa_jax.heads.refitting import FOLLOWED, refit_outputs
from kdgqa_jax.heads.ridge import EVERY, STRENGTHS, UNTRIED, Refit


@dataclasses.dataclass
class Grouped:
    """Parameters with fewer key/value heads, and how they came about.

    Attributes:
      params: of the converted model and its dtype, NumPy arrays, layers stacked where they were.
      how: what was done to the projections, by name ("query", "key", "value", "out").
      notes: sentences of the report.
      warnings: sentences that should be seen.
      energy_kept: of merged heads by layer: {"keys": K shares, "values": K shares}; what was not
        merged has none.
      discarded: by layer the shares of its logits and values that are other ones, before any
        refitting (`forecast.discarded`); {}: heads are as they were, or it cannot be said.
    """

    params: dict[str, Any]
    how: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    energy_kept: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    discarded: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


WIDTH = "width"
"""The rule that makes heads narrower and leaves their number: `svd`, held to that."""

BY_DATA = (*MERGING, WIDTH)
"""Rules that calibration images are for."""

RULES = (*POOLING, *BY_DATA)


def check_pooling(pooling: str, calibrated: bool, refit: bool) -> None:
    """Raise UserError for an unknown rule, or where calibration images lack or have no use."""
    if pooling not in RULES:
        raise unknown("pooling", pooling, RULES)
    if refit and not calibrated:
        raise UserError(
            "refitting follows the original model on images: --refit needs --calibration (a data"
            " set or a folder of images)"
        )
    if calibrated and pooling in POOLING and not refit:
        takers = ", ".join(BY_DATA)
        raise UserError(
            f"pooling {pooling!r} takes no calibration images; {takers} do, and so does --refit"
        )


def check_heads(before: vit.VisionTransformer, after: vit.VisionTransformer, pooling: str) -> None:
    """Raise UserError unless a rule makes the heads of one model those of the other."""
    have, want = before.attention.num_kv_heads, after.attention.num_kv_heads
    narrows = before.head_widths != after.head_widths
    check_groups(have, want)
    if pooling == WIDTH and have != want:
        raise UserError(
            f"pooling {WIDTH!r} keeps all {have} key/value heads, and {want} were asked for; give"
            f" --num-kv-heads {have}, or take 'svd', which makes heads fewer and narrower at once"
        )
    if narrows and pooling not in (*NARROWING, WIDTH):
        old, new = (f"{h} (values {v})" for h, v in (before.head_widths, after.head_widths))
        raise UserError(
            f"pooling {pooling!r} leaves heads as wide as they are, {old}, and not {new};"
            f" {' and '.join((*NARROWING, WIDTH))} make them narrower"
        )


def group_heads(
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    pooling: str = "mean",
    *,
    seed: int = 0,
    images: np.ndarray | None = None,
    merge_by_data: bool = True,
    moments: Mapping[str, InputMoments] | None = None,
    refit: bool = False,
) -> Grouped:
    """Parameters for a model with fewer or narrower heads.

    Args:
      before: the model that there is, any variant.
      variables: its {"params": ..., and for DGQA "norm_stats": ...}.
      after: the model that is wanted; it differs in its attention, and its dtypes, alone.
      pooling: a name in `RULES`.
      seed: of random pooling.
      images: (n, height, width, channels) float32, normalised, to merge and refit by.
      merge_by_data: False, or no images: merging goes by weights and norm scales alone.
      moments: of `images`, as `calibration.gather_moments` gives them, for several conversions of
        a model; None: they are gathered.
      refit: `refit_outputs` afterwards.

    Raises:
      UserError: K does not divide the number of heads, numbers too large for the dtype, a kind of
        block that cannot be merged so, or what `check_pooling` and `check_heads` say.
    """
    check_pooling(pooling, images is not None, refit)
    check_heads(before, after, pooling)
    have, want = before.attention.num_kv_heads, after.attention.num_kv_heads
    narrows = before.head_widths != after.head_widths
    variables = {**variables, "params": tree_utils.widened(variables["params"])}
    grouped = Grouped(variables["params"])
    by = images if merge_by_data else None
    if by is None:
        moments = None
    if narrows or (have != want and pooling in MERGING):
        if moments is None:
            moments = layer_moments(before, variables, by)
        rule = "svd" if pooling == WIDTH else pooling
        _merge(grouped, before, variables, after, rule, moments, by)
    elif have != want:
        grouped.params = to_grouped(grouped.params, want, pooling, seed)
        grouped.how = dict.fromkeys(("key", "value"), f"pooled {have} to {want} heads ({pooling})")
    if narrows or have != want:
        _forecast(grouped, before, variables, after, moments, by is not None)
    grouped.params = tree_utils.cast(grouped.params, after.param_dtype)
    if refit:
        _refit(grouped, before, variables, after, images)
    return grouped


def _merge(
    grouped: Grouped,
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    rule: str,
    moments: Mapping[str, InputMoments],
    images: np.ndarray | None,
) -> None:
    have, want = before.attention.num_kv_heads, after.attention.num_kv_heads
    if have == want:
        _check_equal_groups(before, variables, after)
        params, fixed = variables["params"], _known_groups(before, variables)
    else:
        params, fixed = as_equal_groups(before, variables)
    if not fixed:
        grouped.warnings.append(
            f"the query heads of a {before.attention.variant} model go to other key/value"
            f" heads from batch to batch; {rule} takes them as equal groups"
        )
    by = "without data, by weights and norm scales"
    if images is not None:
        by = f"calibrated with {len(images)} images"
    head_width, v_head_width = after.head_widths
    grouped.params, merged = to_merged(
        params, want, moments, rule, head_width=head_width, v_head_width=v_head_width
    )
    averaged = not_linear(next(iter(merged.values())).attention)
    widths = zip(before.head_widths, after.head_widths, strict=True)
    pairs = (("key", "query"), ("value", "out"))
    for (projection, other), (old, new) in zip(pairs, widths, strict=True):
        fewer = [] if have == want else [f"merged {have} to {want} heads ({rule})"]
        narrower = [] if old == new else [f"narrowed {old} to {new} ({rule})"]
        if projection in averaged and fewer:
            grouped.how[projection] = f"pooled {have} to {want} heads (mean)"
            grouped.notes.append(
                f"{projection} heads averaged, not merged: {averaged[projection]} lets no linear"
                " map through"
            )
        elif fewer or narrower:
            grouped.how[projection] = "; ".join(fewer + narrower)
            what = "merged" if fewer else "narrower"
            grouped.how[other] = f"adapted to {what} heads ({rule})"
    grouped.energy_kept = {
        name: {side: kept.tolist() for side, kept in _shares(layer).items()}
        for name, layer in merged.items()
    }
    done = "merged" if have != want else "narrowed"
    grouped.notes.append(f"heads {done} by {rule}, {by}; {_energy_kept(merged)}")
    if after.attention.rule.dynamic:
        grouped.warnings.append(
            f"{rule} fits each query head to the key/value head of its own group: a query head that"
            f" {after.attention.variant} sends to another group's no longer matches it"
        )


def _forecast(
    grouped: Grouped,
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    moments: Mapping[str, InputMoments] | None,
    calibrated: bool,
) -> None:
    """What was discarded, where products of weights say it: no norms between, groups that stay."""
    params, fixed = as_equal_groups(before, variables)
    params, new = (tree_utils.unstack_layers(tree) for tree in (params, grouped.params))
    if not fixed or after.attention.rule.dynamic or not_linear(new["blocks_0"]["attn"]):
        return
    if moments is None:
        if before.block.block == "post_norm":  # nothing normalises what attention sees
            return
        calibrated, moments = False, data_free_by_layer(params)
    grouped.discarded = {
        name: discarded(params[name]["attn"], new[name]["attn"], of_layer, params[name].get("ls1"))
        for name, of_layer in moments.items()
    }
    grouped.notes.insert(0, f"predicted: {forecast(grouped.discarded, calibrated)}")


def as_equal_groups(
    model: vit.VisionTransformer, variables: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Parameters of a model for which equal groups are right, and whether there are such.

    Where a rule has fixed the allocation, each key/value head is there once for every query head
    that it serves. Where images decide about it, parameters are as they were, and groups are not.
    """
    params = variables["params"]
    if not model.attention.rule.dynamic:
        return params, True
    allocations = analysis.fixed_allocations(model, variables.get("norm_stats", {}))
    if any(allocation is None for allocation in allocations):
        return params, False
    return one_per_query_head(params, allocations), True


def _known_groups(model: vit.VisionTransformer, variables: dict[str, Any]) -> bool:
    """The query heads of a model go to the same key/value heads whatever the images."""
    allocations = analysis.fixed_allocations(model, variables.get("norm_stats", {}))
    return all(allocation is not None for allocation in allocations)


def _check_equal_groups(
    before: vit.VisionTransformer, variables: dict[str, Any], after: vit.VisionTransformer
) -> None:
    """Raise UserError for a memory that is kept whose groups are not those that rules go by."""
    if _measures(before) != _measures(after):
        return
    found = analysis.fixed_allocations(before, variables.get("norm_stats", {}))
    for i, allocation in enumerate(found):
        if allocation is not None and len(set(allocation.tolist())) > 1:
            raise UserError(
                f"layer {i} of this {before.attention.variant} model serves"
                f" {' '.join(map(str, allocation))} query heads by its key/value heads, and rules"
                " take groups as equal; make the heads of the model that it came from narrower"
            )


def _shares(layer: Merged) -> dict[str, np.ndarray]:
    """Of the energy kept, (K,) each, of what was merged."""
    shares = {"keys": layer.keys_kept, "values": layer.values_kept}
    return {side: kept for side, kept in shares.items() if kept is not None}


def _energy_kept(merged: dict[str, Merged]) -> str:
    layers_kept = []
    for name, layer in merged.items():
        shown = ", ".join(f"{kept.min():.1%} of {side}" for side, kept in _shares(layer).items())
        layers_kept.append(f"{name.removeprefix('blocks_')}: {shown}")
    return f"energy kept by layer, least over its groups: {'; '.join(layers_kept)}"


def _refit(
    grouped: Grouped,
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    images: np.ndarray,
) -> None:
    memory, _ = fit_norm_stats(before, variables.get("norm_stats", {}), after)
    converted = {"params": grouped.params, "norm_stats": memory}
    grouped.params, refits = refit_outputs(before, variables, after, converted, images)
    grouped.how["out"] = "; ".join([*filter(None, [grouped.how.get("out")]), "refitted"])
    by_layer = {name.removeprefix("blocks_"): refit for name, refit in refits.items()}
    shares = [f"{i}: {refit.before:.1%} to {refit.after:.1%}" for i, refit in by_layer.items()]
    what = FOLLOWED[before.block.block].what
    grouped.notes += [
        f"ridge of the refitting: {_ridge(by_layer)}",
        f"output projections refitted with {len(images)} images; share of {what} that is missed, by"
        f" layer: {'; '.join(shares)}",
    ]


def _ridge(by_layer: dict[str, Refit]) -> str:
    """How its strength was chosen."""
    tried = [
        f"{i}: {refit.strength:g}, {refit.held_out[refit.strength]:.1%}"
        for i, refit in by_layer.items()
        if refit.held_out
    ]
    if not tried:
        return f"{UNTRIED:g}, as there are fewer than {EVERY} images to hold some out"
    return (
        f"of {', '.join(f'{s:g}' for s in STRENGTHS)} the one that misses least on every {EVERY}th"
        f" image, held out; by layer it and what it missed there: {'; '.join(tried)}"
    )


def fit_norm_stats(
    before: vit.VisionTransformer, norm_stats: dict[str, Any], after: vit.VisionTransformer
) -> tuple[dict[str, Any], set[tuple[str, ...]]]:
    """The memory of a converted model, and the paths in it of what was kept of the source's.

    Kept is what both have, where they have one and the same key/value heads and score them alike;
    the rest is as it starts: no norms, equal groups.

    Args:
      before: the model that there is, any variant.
      norm_stats: its memory, layers stacked or not; {}: none.
      after: the model that is wanted.

    Returns:
      ({...}, layers unrolled, {} for a variant without memory; paths such as ("blocks_0", "attn",
      "key_norm")).
    """
    wanted = flatten_dict(jax.device_get(vit.init_norm_stats(after.clone(scan_layers=False))))
    kept = {}
    if _measures(before) == _measures(after):
        there = flatten_dict(tree_utils.unstack_layers(norm_stats))
        kept = {p: x for p, x in there.items() if p in wanted and x.shape == wanted[p].shape}
    return unflatten_dict({**wanted, **kept}), set(kept)


def _measures(model: vit.VisionTransformer) -> tuple[str, int]:
    return model.attention.rule.measure, model.attention.num_kv_heads
