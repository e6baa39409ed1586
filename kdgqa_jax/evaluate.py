"""Evaluation: top-1, top-5 and loss over a whole split, jitted, every image once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdgqa_jax import layers, sharding, vit
from kdgqa_jax.data import augment, pipeline

Array = jax.Array


def correct_in_top(logits: Array, labels: Array, k: int) -> Array:
    """(B,) bool: fewer than k classes have a larger logit than the label, ties by index."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    return jnp.sum(ahead, axis=-1) < k


@functools.lru_cache(maxsize=4)
def make_eval_step(model: vit.VisionTransformer, mean: float, std: float) -> Callable[..., Any]:
    """A jitted (variables, batch) -> sums over the real images, and the allocation of the batch.

    The same arguments give the same function, so that stages of a study share one compilation.
    `mean` and `std` normalise pixel values in 0..1.
    """

    @jax.jit
    def eval_step(variables: dict[str, Any], batch: dict[str, Array]) -> dict[str, Array]:
        labels, mask = batch["label"], batch["mask"]
        images = augment.to_model_input(batch["image"], model.image_shape, mean, std)
        logits, collections = vit.apply_in_evaluation(model, variables, images, mask)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        per_image = {
            "loss": loss,
            "top1": correct_in_top(logits, labels, 1),
            "top5": correct_in_top(logits, labels, 5),
            "count": jnp.ones_like(loss),
        }
        sums = {name: jnp.sum(jnp.where(mask, x, 0.0)) for name, x in per_image.items()}
        return {**sums, "allocation": layers.grouping_of(collections)["allocation"]}

    return eval_step


def evaluate(
    eval_step: Callable[..., Any],
    variables: dict[str, Any],
    split: Sequence[dict[str, Any]],
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Evaluate on a split, in its order; `eval_step` comes from `make_eval_step`.

    Returns:
      top1 and top5 in percent, loss (mean cross entropy in nats), count (images), and allocation:
      per layer the one that most batches (or images, in example scope) had. In batch scope the
      grouping of `kdgqa`, and so its accuracy, depends on which images share a batch.
    """
    sums = [
        eval_step(variables, sharding.put_batch(batch, mesh))
        for batch in pipeline.eval_batches(split, batch_size)
    ]
    sums = jax.device_get(sums)
    total = {name: float(sum(s[name] for s in sums)) for name in ("loss", "top1", "top5", "count")}
    allocations = []
    for s in sums:
        allocations += layers.allocations_by_batch(s["allocation"], int(s["count"]))
    return {
        "top1": 100 * total["top1"] / total["count"],
        "top5": 100 * total["top5"] / total["count"],
        "loss": total["loss"] / total["count"],
        "count": int(total["count"]),
        "allocation": [rows[0].tolist() for rows in layers.allocations_by_frequency(allocations)],
    }
