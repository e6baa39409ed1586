"""One training step: what it changes, and the jitted function that changes it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from kdgqa_jax import fitting, optim, sharding, tree_utils, vit
from kdgqa_jax.data import augment
from kdgqa_jax.evaluate import correct_in_top

Array = jax.Array
Tree = dict[str, Any]

ON_NONFINITE = ("stop", "skip")


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes: saved, restored and donated as a whole."""

    step: Array  # () int32, the number of updates done: the global optimizer step
    params: Any
    norm_stats: Any  # DGQA's memory; {} for variants without
    opt_state: Any
    ema: Any  # the moving average of params; {} without one
    rng: Array  # key data; the key of a step is folded from it and the step
    skipped: Array  # () int32, updates left out because loss or gradients were not finite
    first_skipped: Array  # () int32, the step of the first of them; 0: none

    @property
    def variables(self) -> Tree:
        """What is evaluated and kept: the moving average of the weights where there is one."""
        return {"params": self.ema or self.params, "norm_stats": self.norm_stats}


def init_state(variables: Tree, config: ml_collections.ConfigDict, rng: Array) -> TrainState:
    """The state before the first step.

    Args:
      variables: of a model.
      config: the fields of `config.train_config()`.
      rng: a key.
    """
    params = variables["params"]

    def zero() -> Array:  # one buffer each: a step donates them
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        params=params,
        norm_stats=variables.get("norm_stats", {}),
        opt_state=optim.make_optimizer(config.optim, 1).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else {},
        rng=jax.random.key_data(rng),
        skipped=zero(),
        first_skipped=zero(),
    )


STEP_FIELDS = ("optim", "ema_decay", "on_nonfinite", "batch_size", "accumulate", "microbatch")
INPUT_FIELDS = ("mean", "std", "augment")


def step_config(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """The part of a training config that decides about a step; hashable."""
    fields = {name: config[name] for name in STEP_FIELDS}
    data = {name: config.data[name] for name in INPUT_FIELDS}
    return ml_collections.FrozenConfigDict({**fields, "data": data})


@functools.lru_cache(maxsize=2)
def make_train_step(
    model: vit.VisionTransformer,
    config: ml_collections.FrozenConfigDict,
    num_steps: int,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """A jitted (state, batch) -> (state, metrics) that donates the state.

    The same arguments give the same function, so that stages of a study share one compilation.
    Batches are split over the mesh, so sums over the batch, key norms among them, are global.
    An update whose loss or gradients are not finite changes nothing but `step` and the counts; if
    that is to stop the run, nor does any update after it.

    Args:
      model: the ViT.
      config: what `step_config` gives.
      num_steps: of the run; the schedule depends on it.
      mesh: the devices.
    """
    optimizer = optim.make_optimizer(config.optim, num_steps)
    largest = fitting.microbatch(model, config, mesh)
    parts = sharding.microbatches(config.batch_size, mesh, config.accumulate, largest)
    if parts > 1:
        gradients = functools.partial(_accumulated, model, parts)
    else:
        gradients = functools.partial(_gradients, model)

    @sharding.jit_for(mesh, donate_argnums=0)
    def train_step(state: TrainState, batch: dict[str, Array]):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        dropout_rng, noise_rng, augment_rng = jax.random.split(rng, 3)
        with jax.named_scope("augmentation"):
            images, targets = augment.training_batch(
                batch["image"],
                batch["label"],
                augment_rng,
                config.data.augment,
                model.image_shape,
                model.num_classes,
                config.data.mean,
                config.data.std,
            )
        batch_parts = {"images": images, "targets": targets, "labels": batch["label"]}
        rngs = {"dropout": dropout_rng, "noise": noise_rng}
        grads, norm_stats, metrics = gradients(state, batch_parts, rngs)

        grad_norm = optax.tree.norm(tree_utils.widened(grads))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        stopped = (state.first_skipped > 0) & (config.on_nonfinite == "stop")
        apply = finite & ~stopped
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        changed = {
            "params": params,
            "norm_stats": tree_utils.map_attention(model.attention.rule.learn, norm_stats, grads),
            "opt_state": opt_state,
            "ema": _average(state.ema, params, state.step, config.ema_decay),
        }
        kept = {name: getattr(state, name) for name in changed}
        changed = jax.tree.map(lambda new, old: jnp.where(apply, new, old), changed, kept)
        step = state.step + 1
        first = jnp.where((state.first_skipped == 0) & ~finite, step, state.first_skipped)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        new_state = state.replace(**changed, step=step, skipped=skipped, first_skipped=first)
        metrics |= {
            "grad_norm": grad_norm,
            "skipped_updates": new_state.skipped,
            "first_skipped": new_state.first_skipped,
        }
        if "corrupt" in batch:
            metrics["corrupt_images"] = jnp.sum(batch["corrupt"])
        constrain = jax.lax.with_sharding_constraint
        return (
            constrain(new_state, sharding.by_rules(new_state, mesh)),
            constrain(metrics, sharding.replicated(mesh)),
        )

    return train_step


def _average(ema: Tree, params: Tree, step: Array, decay: float) -> Tree:
    """The moving average of weights; its decay grows to `decay`, so that it forgets the start."""
    if not ema:
        return ema
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: (a + (1.0 - decay) * (p - a)).astype(a.dtype), ema, params)


def _gradients(
    model: vit.VisionTransformer,
    state: TrainState,
    batch: dict[str, Array],
    rngs: dict[str, Array],
    given: Tree | None = None,
) -> tuple[Tree, Tree, dict[str, Array]]:
    """(gradients of the mean loss, new norm_stats, metrics) of a batch.

    `given` holds allocations to be used as they are; norm_stats then stays as it is.
    """
    fixed = {"norm_stats": state.norm_stats, **({"given": given} if given else {})}
    mutable = ["grouping"] if given else ["grouping", "norm_stats"]

    def loss_fn(params: Tree):
        logits, collections = vit.apply(
            model,
            {"params": params, **fixed},
            batch["images"],
            train=True,
            step=state.step,
            rngs=rngs,
            mutable=mutable,
        )
        targets = batch["targets"]
        if targets.ndim == 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        else:
            losses = optax.softmax_cross_entropy(logits, targets)
        return losses.mean(), (logits, collections)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, collections)), grads = grad_fn(state.params)
    grouping = tree_utils.grouping_of(collections)
    metrics = {"loss": loss}
    for k in (1, 5):
        metrics[f"top{k}"] = 100 * jnp.mean(correct_in_top(logits, batch["labels"], k))
    for name in ("key_norm", "allocation"):
        x = grouping[name]  # (L, K), or by image (L, B, K): logged as the mean over the batch
        metrics[name] = x.mean(axis=1) if x.ndim == 3 else x
    return grads, collections.get("norm_stats", {}), metrics


def _accumulated(
    model: vit.VisionTransformer,
    parts: int,
    state: TrainState,
    batch: dict[str, Array],
    rngs: dict[str, Array],
) -> tuple[Tree, Tree, dict[str, Array]]:
    """What `_gradients` gives, one part of the batch after the other.

    Variants that group by the whole batch first look at it in one forward pass, which keeps nothing
    for a backward pass; all parts then use its allocations, as the whole batch would.
    """
    norm_stats, given = _whole_batch_grouping(model, state, batch["images"], rngs)
    # Part i takes every parts-th image from the i-th on: so each device has a share of each part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: tuple[Array, dict[str, Array]]):
        index, part = part
        own = {**rngs, "dropout": jax.random.fold_in(rngs["dropout"], index)}
        grads, _, metrics = _gradients(model, state, part, own, given)
        new = (grads, metrics)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype) / parts, total, new), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(lambda: _gradients(model, state, first, rngs, given)[::2])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), split))
    grads = jax.tree.map(lambda x, like: x.astype(like.dtype), grads, shapes[0])
    return grads, norm_stats, metrics


def _whole_batch_grouping(
    model: vit.VisionTransformer, state: TrainState, images: Array, rngs: dict[str, Array]
) -> tuple[Tree, Tree | None]:
    """(new norm_stats, the allocations of the batch; None where no rule looks at the batch)."""
    if not model.attention.rule.by_batch:
        return state.norm_stats, None

    def look() -> tuple[Tree, Tree]:
        _, collections = vit.apply(
            model,
            {"params": state.params, "norm_stats": state.norm_stats},
            images,
            train=True,
            step=state.step,
            rngs=rngs,
            mutable=["grouping", "norm_stats"],
        )
        allocation = tree_utils.only(collections["grouping"], "allocation")
        return collections.get("norm_stats", {}), allocation

    def keep() -> tuple[Tree, Tree]:
        def fixed(memory: Tree) -> Tree:
            return {"allocation": model.attention.fixed_allocation(memory)}

        return state.norm_stats, tree_utils.map_attention(fixed, state.norm_stats)

    due = model.attention.rule.due(state.step)
    return look() if due is True else jax.lax.cond(due, look, keep)
