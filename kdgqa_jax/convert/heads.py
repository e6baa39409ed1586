"""Fewer key/value heads for a whole model: pooled or merged, and refitted, with a report.

Checkpoints of any source and the models of a study go through `group_heads` alike.
"""

import dataclasses
from typing import Any

import numpy as np

from kdgqa_jax import vit
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.convert.calibration import gather_moments
from kdgqa_jax.convert.merging import MERGING, Merged, one_per_query_head, to_merged
from kdgqa_jax.convert.pooling import POOLING, check_groups, to_grouped
from kdgqa_jax.convert.refitting import refit_outputs
from kdgqa_jax.errors import UserError, unknown


@dataclasses.dataclass
class Grouped:
    """Parameters with fewer key/value heads, and how they came about.

    Attributes:
      params: of the converted model, layers stacked where they were.
      how: what was done to the projections, by name ("query", "key", "value", "out").
      notes: sentences of the report.
      warnings: sentences that should be seen.
      energy_kept: of merged heads by layer: {"keys": K shares, "values": K shares}.
    """

    params: dict[str, Any]
    how: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    energy_kept: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)


def check_pooling(pooling: str, calibrated: bool, refit: bool) -> None:
    """Raise UserError for an unknown rule, or where calibration images lack or have no use."""
    if pooling not in (*POOLING, *MERGING):
        raise unknown("pooling", pooling, (*POOLING, *MERGING))
    if refit and not calibrated:
        raise UserError(
            "refitting follows the original model on images: --refit needs --calibration (a data"
            " set or a folder of images)"
        )
    if calibrated and pooling not in MERGING and not refit:
        raise UserError(
            f"pooling {pooling!r} takes no calibration images; {' and '.join(MERGING)} do, and so"
            " does --refit"
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
    refit: bool = False,
) -> Grouped:
    """Parameters for a model with fewer key/value heads.

    Args:
      before: the model that there is, any variant.
      variables: its {"params": ..., and for DGQA "norm_stats": ...}.
      after: the model that is wanted; it differs in its attention alone.
      pooling: a name in `POOLING` or `MERGING`.
      seed: of random pooling.
      images: (n, height, width, channels) float32, normalised, to merge and refit by.
      merge_by_data: False, or no images: merging goes by weights and norm scales alone.
      refit: `refit_outputs` afterwards.

    Raises:
      UserError: K does not divide the number of heads, or what `check_pooling` says.
    """
    check_pooling(pooling, images is not None, refit)
    have, want = before.attention["num_kv_heads"], after.attention["num_kv_heads"]
    grouped = Grouped(variables["params"])
    if have != want and pooling in MERGING:
        by = images if merge_by_data else None
        _merge(grouped, before, variables, after, pooling, by)
    elif have != want:
        grouped.params = to_grouped(grouped.params, want, pooling, seed)
        grouped.how = dict.fromkeys(("key", "value"), f"pooled {have} to {want} heads ({pooling})")
    if refit:
        _refit(grouped, before, variables, after, images)
    return grouped


def _merge(
    grouped: Grouped,
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    rule: str,
    images: np.ndarray | None,
) -> None:
    have, want = before.attention["num_kv_heads"], after.attention["num_kv_heads"]
    check_groups(have, want)
    memory, source = variables.get("norm_stats", {}), before.attention["attention"]
    params = one_per_query_head(variables["params"], memory)
    if VARIANTS[source].rule is not None and not memory:
        grouped.warnings.append(
            f"the query heads of a {source} model go to other key/value heads from batch to batch;"
            f" {rule} takes them as equal groups"
        )
    moments, by = None, "without data, by weights and norm scales"
    if images is not None:
        moments = gather_moments(before, variables, images)
        by = f"calibrated with {len(images)} images"
    grouped.params, merged = to_merged(params, want, moments, rule)
    grouped.how = {
        **dict.fromkeys(("key", "value"), f"merged {have} to {want} heads ({rule})"),
        **dict.fromkeys(("query", "out"), f"adapted to merged heads ({rule})"),
    }
    grouped.energy_kept = {
        name: {"keys": layer.keys_kept.tolist(), "values": layer.values_kept.tolist()}
        for name, layer in merged.items()
    }
    grouped.notes.append(f"heads merged by {rule}, {by}; {_energy_kept(merged)}")
    attention = after.attention["attention"]
    if VARIANTS[attention].rule is not None:
        grouped.warnings.append(
            f"{rule} fits each query head to the key/value head of its own group: a query head that"
            f" {attention} sends to another group's no longer matches it"
        )


def _energy_kept(merged: dict[str, Merged]) -> str:
    layers_kept = [
        f"{name.removeprefix('blocks_')}: {layer.keys_kept.min():.1%} of keys,"
        f" {layer.values_kept.min():.1%} of values"
        for name, layer in merged.items()
    ]
    return f"energy kept by layer, least over its groups: {'; '.join(layers_kept)}"


def _refit(
    grouped: Grouped,
    before: vit.VisionTransformer,
    variables: dict[str, Any],
    after: vit.VisionTransformer,
    images: np.ndarray,
) -> None:
    converted = {"params": grouped.params}
    memory = variables.get("norm_stats")
    if before.attention["num_kv_heads"] != after.attention["num_kv_heads"] or not memory:
        memory = vit.init_norm_stats(after.clone(scan_layers=True), images.shape[-1])
    if memory:
        converted["norm_stats"] = memory
    grouped.params, missed = refit_outputs(before, variables, after, converted, images)
    grouped.how["out"] = "; ".join([*filter(None, [grouped.how.get("out")]), "refitted"])
    shares = [
        f"{name.removeprefix('blocks_')}: {old:.1%} to {new:.1%}"
        for name, (old, new) in missed.items()
    ]
    grouped.notes.append(
        f"output projections refitted with {len(images)} images; share of what attention should add"
        f" that is missed, by layer: {'; '.join(shares)}"
    )
