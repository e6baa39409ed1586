"""From a checkpoint of any known kind to a model, its variables, and a report of what was done."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdgqa_jax import checkpoint, storage, tree_utils, vit, workdir
from kdgqa_jax.attention import VARIANTS, variant_name
from kdgqa_jax.convert import files
from kdgqa_jax.convert.calibration_images import CalibrationImages
from kdgqa_jax.convert.conversion_report import ConversionReport
from kdgqa_jax.convert.importing import Loaded, load_file
from kdgqa_jax.convert.resizing import (
    RESIZING,
    adapt_input_channels,
    grey_patch_embedding,
    resize_pos_embed,
)
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads import grouping
from kdgqa_jax.version import versions


@dataclasses.dataclass
class Converted:
    """A model in memory, as `checkpoint.save_model` writes it, and how it came about."""

    model: vit.VisionTransformer
    variables: dict[str, Any]  # {"params": ..., and for DGQA "norm_stats": ...}
    description: dict[str, Any]  # model.json
    report: ConversionReport

    def save(self, path: str | os.PathLike) -> None:
        """Write a model directory, whole or not at all. Raises UserError if something is there."""
        checkpoint.save_model(workdir.check_new(path), self.variables, self.description)


def load(
    source: str | os.PathLike,
    *,
    attention: str | None = None,
    num_kv_heads: int | None = None,
    pooling: str = "mean",
    calibration: np.ndarray | CalibrationImages | None = None,
    refit: bool = False,
    head_width: int | None = None,
    v_head_width: int | None = None,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    arch: str | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allow_missing: Sequence[str] = (),
    allow_left_over: Sequence[str] = (),
    allow_nan: bool = False,
) -> Converted:
    """Read a checkpoint and convert it to a variant of grouped query attention.

    Args:
      source: a file or directory of timm, Hugging Face transformers (ViT, DeiT), Google AugReg
        (.npz) or the paper's released code; a model directory of ours; or "hf:org/name".
      attention: a name in `attention.VARIANTS`; None: that of the source.
      num_kv_heads: K; None: that of the source, but N for `mha`, and N/2 where `mha` becomes
        another variant.
      pooling: how key/value heads are pooled, a name in `POOLING`, or merged, one in `MERGING`.
      calibration: images to merge or refit by; the source's own layers say what they see of them:
        (n, height, width, channels) float32, normalised, of the size of the result, or where to
        take them from. None: without data, by weights and norm scales alone.
      refit: solve for the output projections, layer after layer, so that the residual stream
        follows that of the source; needs calibration images.
      head_width: of queries and keys, and at most of values; None: as it is. Narrower heads need a
        rule that makes them, "svd" or "width".
      v_head_width: of values; None: as it is, and at most `head_width`.
      seed: of random pooling and of what is newly initialised.
      image_size: side in pixels or (height, width); the position embedding is resized. None: that
        of the source.
      num_classes: a number other than the source's gives a new head (0: none). None: as it is.
      num_heads: N, where the source does not say.
      arch: timm's name of the architecture, where the weights lie alone and fit several.
      channels: of images: the patch embedding is fitted. None: as it is.
      mean: of pixel values in 0..1, per channel; None: what the source says, else 0.5.
      std: of pixel values in 0..1, per channel; None: what the source says, else 0.5.
      allow_missing: patterns of names that may be missing in the source; newly initialised.
      allow_left_over: patterns of names in the source that are not used.
      allow_nan: accept arrays that hold NaN or infinity.

    Returns:
      Model, variables (layers unrolled; those of a directory of ours as they were), description
      and report.

    Raises:
      UserError: whatever is wrong with the source (all missing, left-over, misshapen or non-finite
        arrays at once) or with what is asked for.
    """
    source = os.fspath(source)
    if source.startswith("hf:"):
        place = files.download(source.removeprefix("hf:"))
    else:
        place = os.fspath(storage.fetched(source, "source"))
    if (pathlib.Path(place) / "model.json").is_file():
        loaded = _load_ours(place)
    else:
        loaded = load_file(place, num_heads, seed, allow_missing, allow_left_over, arch)
    loaded.report.source = source
    if not allow_nan:
        _refuse_nan(loaded)

    if image_size is None and loaded.seen_size is not None:
        image_size = loaded.seen_size
    arguments = _wanted(loaded, attention, num_kv_heads, image_size, num_classes, num_heads)
    before = _source_model(loaded)
    arguments |= _widths(before, head_width, v_head_width)
    model = vit.create(**arguments)
    arguments["num_kv_heads"] = model.attention.num_kv_heads
    _fit_head(loaded, before, model)
    _fit_images(loaded, before, model, channels)
    _fit_preprocessing(loaded, mean, std)
    grouping.check_pooling(pooling, calibration is not None, refit)
    grouping.check_heads(before, model, pooling)
    images = _calibration_images(loaded, model, calibration)
    _fit_kv_heads(loaded, before, model, pooling, seed, images, refit)
    _fit_norm_stats(loaded, before, model)
    for path, x in {**loaded.params, **loaded.norm_stats}.items():
        loaded.report.origins[path].shape = x.shape

    variables = {"params": unflatten_dict(loaded.params, sep="/")}
    if loaded.norm_stats:
        variables["norm_stats"] = unflatten_dict(loaded.norm_stats, sep="/")
    if model.scan_layers:
        variables = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
    own = vit.arguments(model)
    description = {
        **loaded.description,
        "model": {name: x for name, x in arguments.items() if name == "name" or name in own},
        "converted": loaded.report.to_json(),
        "versions": versions(),
    }
    return Converted(model, variables, description, loaded.report)


def _load_ours(place: str) -> Loaded:
    model, variables, description = checkpoint.load_model(place)
    flat = {
        name: flatten_dict(tree_utils.unstack_layers(tree), sep="/")
        for name, tree in variables.items()
    }
    report = ConversionReport(place)
    for name in (*flat["params"], *flat.get("norm_stats", {})):
        report.add(name, name)
    heads_there = {
        "attention": model.attention.variant,
        "num_kv_heads": model.attention.num_kv_heads,
    }
    arguments = {**description.pop("model"), **heads_there}
    params = tree_utils.widened(flat["params"])
    return Loaded(arguments, params, flat.get("norm_stats", {}), description, report)


def _refuse_nan(loaded: Loaded) -> None:
    arrays = {**loaded.params, **loaded.norm_stats}
    bad = [
        loaded.report.origins[path].source or path
        for path, x in arrays.items()
        if not np.isfinite(x).all()
    ]
    if bad:
        raise UserError(
            f"{loaded.report.source}: NaN or infinity in {', '.join(dict.fromkeys(bad))};"
            " --allow-nan accepts that"
        )


def _source_model(loaded: Loaded) -> vit.VisionTransformer:
    """A model with the parameters that were found."""
    attention = loaded.arguments["attention"] or "gqa"
    return vit.create(**{**loaded.arguments, "attention": attention})


def _wanted(
    loaded: Loaded,
    attention: str | None,
    num_kv_heads: int | None,
    image_size: int | tuple[int, int] | None,
    num_classes: int | None,
    num_heads: int | None,
) -> dict[str, Any]:
    """The arguments of `vit.create` for what was asked for."""
    arguments = dict(loaded.arguments)
    have = _source_model(loaded).attention
    if num_heads not in (None, have.num_heads):
        raise UserError(
            f"{loaded.report.source} has {have.num_heads} query heads, not {num_heads}; leave"
            " --num-heads out"
        )
    attention = attention or arguments["attention"]
    if attention is None:
        raise UserError(
            f"{loaded.report.source} has {have.num_kv_heads} key/value heads for"
            f" {have.num_heads} query heads, which gqa, kdgqa and pgqa store alike; give"
            " --attention (a file named after its variant needs none)"
        )
    attention = variant_name(attention)
    if num_kv_heads is None and VARIANTS[attention].multi_head:
        num_kv_heads = have.num_heads
    elif num_kv_heads is None and not _multi_head(arguments["attention"]):
        num_kv_heads = have.num_kv_heads
    asked = {"image_size": image_size, "num_classes": num_classes}
    arguments |= {name: value for name, value in asked.items() if value is not None}
    if arguments["num_classes"] != loaded.arguments["num_classes"]:
        arguments["representation_size"] = 0  # belongs to the old head
    return {**arguments, "attention": attention, "num_kv_heads": num_kv_heads}


def _widths(
    before: vit.VisionTransformer, head_width: int | None, v_head_width: int | None
) -> dict[str, int]:
    """The arguments of `vit.create` that change for heads of these widths."""
    have, v_have = before.head_widths
    head = have if head_width is None else head_width
    value = min(head, v_have) if v_head_width is None else v_head_width
    if head_width is None and v_head_width is None:
        return {}
    for name, old, new in (("head", have, head), ("v-head", v_have, value)):
        if not 1 <= new <= old:
            raise UserError(f"--{name}-width {new}: heads are {old} wide and become no wider")
    changed = {}
    if head != have:
        changed["head_width"] = head
    if value != (before.attention.v_head_width or head):
        changed["v_head_width"] = value
    return changed


def _multi_head(attention: str | None) -> bool:
    """If a source is multi-head; None: it has grouped heads, of some variant."""
    return attention is not None and VARIANTS[attention].multi_head


# --- fitting what was loaded to what is wanted --------------------------------------------------


_HEAD = ("head", "head_dist", "pre_logits")


def _fit_head(loaded: Loaded, before: vit.VisionTransformer, model: vit.VisionTransformer) -> None:
    """A zero head for another number of classes; a representation layer goes with the old one."""
    classes = model.num_classes
    if classes == before.num_classes:
        return
    for name in [n for n in loaded.params if n.split("/")[0] in _HEAD]:
        del loaded.params[name]
        loaded.report.drop(name)
    heads = ("head", "head_dist") if model.distillation == "head" else ("head",)
    for head in heads if classes else ():
        for leaf, shape in (("kernel", (model.width, classes)), ("bias", (classes,))):
            loaded.params[f"{head}/{leaf}"] = np.zeros(shape, np.float32)
            loaded.report.renew(f"{head}/{leaf}", "new, zero")
    loaded.description["class_names"] = [str(i) for i in range(classes)]
    loaded.report.notes.append(
        f"class head: the one for {before.num_classes} classes dropped, one for {classes} new"
    )


def _fit_images(
    loaded: Loaded,
    before: vit.VisionTransformer,
    model: vit.VisionTransformer,
    channels: int | None,
) -> None:
    """Position embedding for another grid of patches, patch embedding for other channels."""
    if before.grid != model.grid:
        loaded.params["pos_embed"] = resize_pos_embed(
            loaded.params["pos_embed"],
            before.grid,
            model.grid,
            model.num_embedded_prefix_tokens,
            loaded.resize,
        )
        grids = " to ".join("x".join(map(str, m.grid)) for m in (before, model))
        loaded.report.changed("pos_embed", f"resized {grids} ({RESIZING[loaded.resize][0]})")
    have = loaded.description["channels"]
    if channels is not None and channels != have:
        _fit_channels(loaded, have, channels)


def _fit_channels(loaded: Loaded, have: int, channels: int) -> None:
    """The patch embedding, and the numbers that normalise images, for other channels."""
    kernel, bias = "patch_embed/kernel", "patch_embed/bias"
    preprocessing = loaded.description["preprocessing"] or {}
    fitted = adapt_input_channels(loaded.params[kernel], channels)
    statistics = {name: np.ravel(preprocessing.get(name, 0.5)) for name in ("mean", "std")}
    if channels == 1 and any(np.ptp(values) for values in statistics.values()):
        if bias not in loaded.params:
            raise UserError(
                f"{loaded.report.source}: the patch embedding has no bias, so a mean and std for"
                " each channel cannot become one of each; leave --channels out and give colour"
                " images whose channels are alike"
            )
        mean, std = (_per_channel(name, statistics[name], have) for name in ("mean", "std"))
        fitted, loaded.params[bias], mean, std = grey_patch_embedding(
            loaded.params[kernel], loaded.params[bias], mean, std
        )
        loaded.report.changed(bias, "mean and std of each channel folded in")
        preprocessing |= {"mean": [mean], "std": [std]}
    loaded.params[kernel] = fitted
    loaded.report.changed(kernel, f"from {have} to {channels} input channels")
    loaded.description["channels"] = channels
    for name in preprocessing.keys() & {"mean", "std"}:
        preprocessing[name] = [float(x) for x in np.resize(preprocessing[name], channels)]


def _per_channel(name: str, values: np.ndarray, channels: int) -> np.ndarray:
    """(channels,) numbers. Raises UserError if there are others than one, or one per channel."""
    if len(values) not in (1, channels):
        raise UserError(
            f"{name} of images has {len(values)} values for {channels} channels; give --{name}"
        )
    return np.broadcast_to(values, (channels,))


def _fit_preprocessing(
    loaded: Loaded, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    """What the source says of images, or as the paper has it; `mean` and `std` as asked for."""
    description, channels = loaded.description, loaded.description["channels"]
    unstated = description["preprocessing"] is None
    halves = [0.5] * channels
    found = {"mean": halves, "std": halves, **(description["preprocessing"] or {})}
    for name, asked in (("mean", mean), ("std", std)):
        if asked is not None:
            values = [float(x) for x in asked]
            found = {**found, name: values * channels if len(values) == 1 else values}
    try:
        checked = Preprocessing(**found)
    except TypeError as error:
        raise UserError(
            f"{loaded.report.source}: unknown preparation of images ({error})"
        ) from None
    for name in ("mean", "std"):
        _per_channel(name, np.ravel(getattr(checked, name)), channels)
    description["preprocessing"] = found
    if unstated:
        loaded.report.notes.append(
            "the source does not say how images are prepared; taken: squashed to the model's size,"
            f" mean {found['mean']}, std {found['std']} (--mean, --std)"
        )


def _calibration_images(
    loaded: Loaded, model: vit.VisionTransformer, calibration: np.ndarray | CalibrationImages | None
) -> np.ndarray | None:
    """(n, height, width, channels) float32, normalised, of the size of the result."""
    channels = loaded.description["channels"]
    if isinstance(calibration, CalibrationImages):
        preprocessing = Preprocessing(**loaded.description["preprocessing"])
        images = calibration.read(model.image_shape, channels, preprocessing)
        loaded.report.notes.append(
            f"calibration images: {len(images)} of {calibration.place}, seed {calibration.seed}"
        )
        return images
    if calibration is None:
        return None
    expected = (*model.image_shape, channels)
    shape = np.shape(calibration)
    if len(shape) != 4 or shape[1:] != expected or not shape[0]:
        raise UserError(
            f"calibration images must be (n, {', '.join(map(str, expected))}), got shape {shape}"
        )
    if not np.isfinite(calibration).all():
        raise UserError("calibration images hold NaN or infinity")
    return calibration


def _fit_kv_heads(
    loaded: Loaded,
    before: vit.VisionTransformer,
    model: vit.VisionTransformer,
    pooling: str,
    seed: int,
    images: np.ndarray | None,
    refit: bool,
) -> None:
    """`grouping.group_heads`, and what the report says about it."""
    variables = {"params": unflatten_dict(loaded.params, sep="/")}
    if loaded.norm_stats:
        variables["norm_stats"] = unflatten_dict(loaded.norm_stats, sep="/")
    source = model.clone(attention=before.attention, scan_layers=False)
    unrolled = model.clone(scan_layers=False)
    grouped = grouping.group_heads(
        source, variables, unrolled, pooling, seed=seed, images=images, refit=refit
    )
    loaded.params = flatten_dict(grouped.params, sep="/")
    report = loaded.report
    report.energy_kept = grouped.energy_kept
    report.notes += grouped.notes
    report.warnings += grouped.warnings
    for name in loaded.params:
        _, _, projection = name.rpartition("/attn/")
        how = grouped.how.get(projection.split("/")[0])
        if how:
            report.changed(name, how)


def _fit_norm_stats(
    loaded: Loaded, before: vit.VisionTransformer, model: vit.VisionTransformer
) -> None:
    """`grouping.fit_norm_stats`, and what the report says about it."""
    norm_stats = unflatten_dict(loaded.norm_stats, sep="/")
    fitted, kept = grouping.fit_norm_stats(before, norm_stats, model)
    there, loaded.norm_stats = loaded.norm_stats, flatten_dict(fitted, sep="/")
    kept = {"/".join(path) for path in kept}
    for path in there.keys() - kept:
        loaded.report.drop(path)
    for path in loaded.norm_stats.keys() - kept:
        loaded.report.renew(path, "new: no norms yet, equal groups")
