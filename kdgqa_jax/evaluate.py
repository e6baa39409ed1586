"""Evaluation: accuracy, loss and calibration over a whole split, jitted, every image once."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from kdgqa_jax import checkpoint, memory, sharding, tree_utils, vit
from kdgqa_jax.console import ProgressBar
from kdgqa_jax.data import augment, pipeline, sources
from kdgqa_jax.data.images import Preprocessing
from kdgqa_jax.errors import UserError

Array = jax.Array

BINS = 15
"""Of confidence, of equal width, as Guo et al. 2017 have them."""

BATCH_SIZE = 256
"""Where none is asked for; of devices that do not divide it, the next multiple."""


def correct_in_top(logits: Array, labels: Array, k: int) -> Array:
    """(B,) bool: fewer than k classes have a larger logit than the label, ties by index.

    Where a logit is NaN nothing is correct.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    return (jnp.sum(ahead, axis=-1) < k) & ~jnp.any(jnp.isnan(logits), axis=-1)


def confidence_bin(confidence: Array) -> Array:
    """(B,) int32: bin m of 0..14 holds the confidences in (m / 15, (m + 1) / 15]."""
    return jnp.clip(jnp.ceil(confidence * BINS) - 1, 0, BINS - 1).astype(jnp.int32)


def calibration_error(count: Any, correct: Any, confidence: Any) -> float:
    """Expected calibration error in percent: the mean over images of abs(accuracy - confidence).

    Accuracy and confidence are those of the bin that an image is in (Guo et al. 2017, "On
    Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3).

    Args:
      count: (15,) images by bin.
      correct: (15,) of them those of which the most probable class is right.
      confidence: (15,) the sum of the probabilities of the most probable classes.
    """
    gaps = np.abs(np.asarray(correct, np.float64) - np.asarray(confidence, np.float64))
    return float(100 * gaps.sum() / np.sum(count))


@functools.lru_cache(maxsize=16)
def make_eval_step(
    model: vit.VisionTransformer,
    mean: augment.Statistic,
    std: augment.Statistic,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[..., Any]:
    """A jitted (variables, batch) -> sums over the real images, and the allocation of the batch.

    The same arguments give the same function, so that stages of a study share one compilation.

    Args:
      model: any variant.
      mean: of pixel values in 0..1: a number, or a tuple of one per channel.
      std: likewise.
      mesh: of the devices that share a batch; None: one device.
    """

    @sharding.jit_for(mesh)
    def eval_step(variables: dict[str, Any], batch: dict[str, Array]) -> dict[str, Any]:
        labels, mask = batch["label"], batch["mask"]
        images = augment.to_model_input(batch["image"], model.image_shape, mean, std)
        logits, collections = vit.apply_in_evaluation(model, variables, images, mask)
        confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        top1 = correct_in_top(logits, labels, 1).astype(jnp.float32)
        per_image = {"count": jnp.ones_like(loss), "top1": top1, "confidence": confidence}

        def sums_by(index: Array, size: int) -> dict[str, Array]:
            members = mask[:, None] & (index[:, None] == jnp.arange(size)[None])
            return {
                name: jnp.sum(jnp.where(members, x[:, None], 0.0), axis=0)
                for name, x in per_image.items()
            }

        return {
            "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
            "top5": jnp.sum(mask & correct_in_top(logits, labels, 5)),
            "by_bin": sums_by(confidence_bin(confidence), BINS),
            "by_class": sums_by(labels, model.num_classes),
            "allocation": tree_utils.grouping_of(collections)["allocation"],
        }

    return eval_step


def evaluate(
    eval_step: Callable[..., Any],
    variables: dict[str, Any],
    split: Sequence[dict[str, Any]],
    batch_size: int,
    mesh: jax.sharding.Mesh,
    per_class: bool = False,
    on_batch: Callable[[int], None] = lambda batches: None,
) -> dict[str, Any]:
    """Evaluate on a split, in its order; `eval_step` comes from `make_eval_step`.

    Args:
      eval_step: of the model.
      variables: of the model.
      split: random access examples of one shape, at least one.
      batch_size: of the global batch; a multiple of the devices that share it.
      mesh: the devices.
      per_class: return accuracies by class too.
      on_batch: called with how many batches have been sent to the devices.

    Returns:
      top1 and top5 in percent, loss (mean cross entropy in nats), calibration_error in percent,
      count (images), and allocation: per layer the one that most batches (or images, in example
      scope) had. In batch scope the grouping of `kdgqa`, and so its accuracy, depends on which
      images share a batch. With `per_class` also that: {"count": images, "top1": percent, None
      where there are no images}, lists in the order of the classes.

    Raises:
      UserError: an image that cannot be read, or none at all.
    """
    if not len(split):
        raise UserError("the split has no images to evaluate on")
    steps: list[dict[str, Any]] = []
    for done, batch in enumerate(pipeline.eval_batches(split, batch_size), 1):
        steps.append(eval_step(variables, sharding.put_batch(batch, mesh)))
        jax.block_until_ready(steps[-3:-2])  # two batches under way are enough
        on_batch(done)
    steps = sharding.to_host(steps, mesh)
    allocations: list[np.ndarray] = []
    for step in steps:
        count = int(step["by_bin"]["count"].sum())
        allocations += tree_utils.allocations_by_batch(step.pop("allocation"), count)
    total = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *steps)
    by_bin, by_class = total["by_bin"], total["by_class"]
    count = by_bin["count"].sum()
    result = {
        "top1": float(100 * by_bin["top1"].sum() / count),
        "top5": float(100 * total["top5"] / count),
        "loss": float(total["loss"] / count),
        "calibration_error": calibration_error(
            by_bin["count"], by_bin["top1"], by_bin["confidence"]
        ),
        "count": int(count),
        "allocation": [
            rows[0].tolist() for rows in tree_utils.allocations_by_frequency(allocations)
        ],
    }
    if per_class:
        pairs = list(zip(by_class["count"], by_class["top1"], strict=True))
        result["per_class"] = {
            "count": [int(n) for n, _ in pairs],
            "top1": [float(100 * correct / n) if n else None for n, correct in pairs],
        }
    return result


# --- Model directories --------------------------------------------------------------------------

SPLITS = ("test", "train")


def evaluate_directory(
    directory: str | os.PathLike,
    data_name: str,
    data_dir: str = "",
    *,
    split: str = "test",
    shift: str = "none",
    batch_size: int | None = None,
    per_class: bool = False,
    compare_names: bool = True,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(figures, class names) for a model directory on any data set that fits it.

    The figures are those of `evaluate`, and batch_size.

    Images are prepared as the model directory says, in the way of training: those that are all of
    one size smaller than the model's are made larger on the device, bilinearly.

    Args:
      directory: a model directory.
      data_name: a name in `sources.SOURCES`.
      data_dir: where its files are.
      split: "test" or "train".
      shift: a name in `sources.SHIFTS`.
      batch_size: images per batch, over all devices; None: `BATCH_SIZE`.
      per_class: return accuracies by class too.
      compare_names: refuse classes of other names; of a model that has numbers for names, how many
        there are counts alone.

    Raises:
      UserError: no model or no data there, or a model for other classes or channels.
    """
    mesh = sharding.make_mesh()
    batch_size = checked_batch_size(batch_size, mesh)
    model, variables, description = checkpoint.load_model(directory)
    dataset = sources.load(data_name, data_dir, shift)
    _check_classes(directory, model, description, dataset, compare_names)
    dataset, statistics = prepared(directory, model, description, dataset)
    examples = {"test": dataset.test, "train": dataset.train}[split]
    memory.check_batch("--batch-size", batch_size, dataset.image_shape)
    eval_step = make_eval_step(model, *statistics, mesh)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    with ProgressBar("evaluate", -(-len(examples) // batch_size)) as bar:
        result = evaluate(
            eval_step, variables, examples, batch_size, mesh, per_class, on_batch=bar.update
        )
    return {**result, "batch_size": batch_size}, dataset.class_names


def checked_batch_size(batch_size: int | None, mesh: jax.sharding.Mesh) -> int:
    """The batch size that was asked for; None: `BATCH_SIZE`, or a bit more for the devices.

    Raises UserError: one that the devices cannot share.
    """
    if batch_size is None:
        batch_size = sharding.next_batch_size(BATCH_SIZE, mesh)
    sharding.check_batch_size("--batch-size", batch_size, mesh)
    return batch_size


def prepared(
    directory: str | os.PathLike,
    model: vit.VisionTransformer,
    description: dict[str, Any],
    dataset: sources.Dataset,
) -> tuple[sources.Dataset, tuple[Any, Any]]:
    """(the data set as a model directory prepares images, mean and standard deviation of pixels).

    Raises UserError: images of another number of channels.
    """
    channels, given = description["channels"], dataset.image_shape[-1]
    if channels != given:
        raise UserError(
            f"the model in {directory} takes {_COLOURS.get(channels, 'other')} images"
            f" ({channels} channels), those of {dataset.name} are {_COLOURS.get(given, 'other')}"
            f" ({given}); `kdgqa convert --source {directory} --channels {given} --out DIR` makes"
            " a model for them"
        )
    preprocessing = Preprocessing(**description.get("preprocessing", {}))
    config = ml_collections.ConfigDict(
        {**dataclasses.asdict(preprocessing), "skip_corrupt": False}, type_safe=False
    )
    return pipeline.prepare(dataset, model.image_shape, config), pipeline.statistics(config)


_COLOURS = {1: "grey", 3: "RGB"}


def _check_classes(
    directory: str | os.PathLike,
    model: vit.VisionTransformer,
    description: dict[str, Any],
    dataset: sources.Dataset,
    compare_names: bool,
) -> None:
    there, here = model.num_classes, len(dataset.class_names)
    if there != here:
        has = f"{there} classes" if there else "no class head"
        raise UserError(
            f"the model in {directory} has {has}, {dataset.name} has {here} classes; evaluate it on"
            " the data that it was trained for, or give it a new head (kdgqa convert --num-classes)"
            " and train that"
        )
    ours, theirs = description.get("class_names") or (), dataset.class_names
    unnamed = len(ours) != here or all(str(name).isdigit() for name in ours)
    if unnamed or not compare_names:
        return
    wrong = [i for i in range(here) if ours[i] != theirs[i]]
    if wrong:
        order = ", in another order" if sorted(ours) == sorted(theirs) else ""
        raise UserError(
            f"the model in {directory} and {dataset.name} differ in {len(wrong)} of {here} class"
            f" names{order}: class {wrong[0]} is {ours[wrong[0]]!r} in the model and"
            f" {theirs[wrong[0]]!r} in the data; if they mean the same, --ignore-class-names"
            " compares their number alone"
        )
