"""Optimizers and learning rate schedules from a config: the fields of `config.optim`.

Parameters are named by their paths with unrolled layers ("blocks_3/attn/key/kernel",
"patch_embed/bias") whatever the layout of the layers is: an array of stacked layers has one name
per layer, and what holds for some of its layers holds for these alone.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from kdgqa_jax import tree_utils
from kdgqa_jax.errors import UserError, unknown

Array = jax.Array
OptimConfig = ml_collections.ConfigDict | ml_collections.FrozenConfigDict


# --- Schedules ----------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Array, Array, OptimConfig], Array | float]] = {
    "constant": lambda progress, steps, optim: 1.0,
    "cosine": lambda progress, steps, optim: _down_to(
        optim.final_fraction, 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    ),
    "linear": lambda progress, steps, optim: _down_to(optim.final_fraction, 1.0 - progress),
    # as big_vision has it: flat for some steps, then as the inverse square root
    "rsqrt": lambda progress, steps, optim: jnp.sqrt(
        optim.decay_steps / (optim.decay_steps + steps)
    ),
    "step": lambda progress, steps, optim: optim.decay_rate ** jnp.floor(steps / optim.decay_steps),
    "exponential": lambda progress, steps, optim: optim.decay_rate ** (steps / optim.decay_steps),
}
"""Fraction of the peak learning rate, from (share in 0..1 and number of the steps after the
warm-up that are done, the config)."""


def _down_to(final: float, fraction: Array) -> Array:
    return final + (1.0 - final) * fraction


def make_schedule(optim: OptimConfig, num_steps: int) -> optax.Schedule:
    """The learning rate by step: (updates done before, int or () int32) -> () float32.

    It grows linearly from 0 over `warmup_steps`, follows one of `SCHEDULES` and, over the last
    `cooldown_steps`, falls linearly to zero besides; after the warm-up it stays at or above
    `final_fraction` of the peak.

    Args:
      optim: the fields of `config.optim`.
      num_steps: updates of the whole run.

    Raises:
      UserError: a bad value anywhere in `optim`, those of the optimizer included.
    """
    _check(optim)
    shape, warmup, cooldown = SCHEDULES[optim.schedule], optim.warmup_steps, optim.cooldown_steps
    after_warmup = max(num_steps - warmup, 1)

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        since = jnp.maximum(step - warmup, 0.0)
        fraction = shape(jnp.minimum(since / after_warmup, 1.0), since, optim)
        if cooldown:
            fraction *= jnp.clip((num_steps - step) / cooldown, 0.0, 1.0)
        fraction = jnp.maximum(fraction, optim.final_fraction)
        if warmup:
            fraction *= jnp.minimum(step / warmup, 1.0)
        return jnp.asarray(optim.learning_rate * fraction, jnp.float32)

    return schedule


# --- Optimizer ----------------------------------------------------------------------------------

_VECTORS = ("bias", "scale", "ls1", "ls2")

WITHOUT_DECAY: dict[str, tuple[str, ...]] = {
    "none": (),  # as published
    "bias_and_norm": _VECTORS,
    "bias_norm_and_embeddings": (*_VECTORS, "cls_token", "dist_token", "pos_embed"),
}
"""The last parts of the names of parameters without weight decay; the last row is timm's."""

_EMBEDDINGS = (
    "patch_embed", "patch_norm", "cls_token", "dist_token", "reg_token", "pos_embed", "norm_pre"
)  # fmt: skip

MU_DTYPES = ("float32", "bfloat16")

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda x: 0.0 < x < float("inf"), "positive"),
    "warmup_steps": (lambda x: x >= 0, "0 or more"),
    "cooldown_steps": (lambda x: x >= 0, "0 (none) or more"),
    "decay_steps": (lambda x: x > 0, "positive"),
    "decay_rate": (lambda x: 0.0 < x <= 1.0, "above 0 and at most 1"),
    "final_fraction": (lambda x: 0.0 <= x <= 1.0, "in 0..1"),
    "beta1": (lambda x: 0.0 <= x < 1.0, "at least 0 and below 1"),
    "beta2": (lambda x: 0.0 <= x < 1.0, "at least 0 and below 1"),
    "eps": (lambda x: 0.0 < x < float("inf"), "positive"),
    "weight_decay": (lambda x: 0.0 <= x < float("inf"), "0 (none) or more"),
    "clip_norm": (lambda x: 0.0 <= x < float("inf"), "0 (off) or more"),
    "layer_decay": (lambda x: 0.0 < x <= 1.0, "above 0 and at most 1 (off)"),
}


def _check(optim: OptimConfig) -> None:
    for field, known in (
        ("schedule", SCHEDULES),
        ("weight_decay_exclude", WITHOUT_DECAY),
        ("mu_dtype", MU_DTYPES),
    ):
        if optim[field] not in known:
            raise unknown(field, optim[field], known)
    for field, (holds, expected) in _RANGES.items():
        if not holds(optim[field]):
            raise UserError(f"optim.{field}={optim[field]} must be {expected}")


def make_optimizer(optim: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW as torch has it: by default with decoupled weight decay on every parameter.

    In order: gradients of frozen parameters are dropped, the others clipped to a global norm of
    `clip_norm`; Adam (arXiv 1412.6980) with the first moment in `mu_dtype`; weight decay (arXiv
    1711.05101); the learning rate, smaller by a factor of `layer_decay` per layer from the head
    down (arXiv 2106.08254). Frozen parameters do not change, and an array that is frozen as a whole
    has no moments. Moments and updates are float32, whatever the parameters are.

    It reads the parameters' names and shapes in `init` and `update`; abstract and sharded ones do.

    Args:
      optim: the fields of `config.optim`.
      num_steps: updates of the whole run; the schedule depends on it.

    Raises:
      UserError: a bad value; from `init`, a pattern of `freeze` that matches no parameter.
    """
    schedule = make_schedule(optim, num_steps)
    adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps, mu_dtype=optim.mu_dtype)
    first, last, decayed = [], [], None
    if optim.freeze:

        def not_wholly_frozen(tree: Any) -> Any:
            return jax.tree.map(lambda x: bool(x.any()), trainable(optim, tree))

        first.append(_scale_by(lambda tree: trainable(optim, tree)))
        adam = optax.masked(adam, not_wholly_frozen)
    if optim.clip_norm:
        first.append(optax.clip_by_global_norm(optim.clip_norm))
    if WITHOUT_DECAY[optim.weight_decay_exclude]:
        without = WITHOUT_DECAY[optim.weight_decay_exclude]

        def decayed(tree: Any) -> Any:
            flags = _by_name(lambda name: name.split("/")[-1] not in without, tree)
            return jax.tree.map(lambda x: bool(x.any()), flags)  # the same for all layers

    if optim.freeze or optim.layer_decay < 1.0:
        last.append(_scale_by(lambda tree: learning_rate_factors(optim, tree)))
    return _in_float32(
        optax.chain(
            *first,
            adam,
            optax.add_decayed_weights(optim.weight_decay, decayed),
            *last,
            optax.scale_by_learning_rate(schedule),
        )
    )


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with gradients, parameters and moments of half precision taken as float32.

    In bfloat16 the second moment would hardly decay, in float16 `eps` would be zero.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, params = tree_utils.widened((updates, params))
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer count
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(
        lambda params: optimizer.init(tree_utils.widened(params)), update
    )


def trainable(optim: OptimConfig, params: Any) -> Any:
    """Which parameters are trained: a tree of NumPy bool arrays.

    Args:
      optim: `freeze` holds patterns with *, ? and [0-9] (* also stands for slashes), each for whole
        names or for what they begin with: "patch_embed", "blocks_[0-5]", "*/attn/key/bias".
      params: arrays, or their shapes; layers in either layout.

    Returns:
      () for every array, (L, 1, ..) for one of stacked layers.

    Raises:
      UserError: a pattern matches no parameter, or together they match all.
    """
    names = _all_names(params)
    frozen: set[str] = set()
    for pattern in optim.freeze:
        found = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")
        }
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"optim.freeze: {pattern!r} matches no parameter; the nearest are {', '.join(near)}"
            )
        frozen |= found
    if frozen.issuperset(names):
        raise UserError(
            f"optim.freeze={tuple(optim.freeze)} freezes every parameter; leave some to train"
        )
    return _by_name(lambda name: name not in frozen, params)


def learning_rate_factors(optim: OptimConfig, params: Any) -> Any:
    """What the learning rate of every parameter is multiplied by: a tree of float32 NumPy arrays.

    1 for the head and the final norm, `layer_decay` to the power of L - i for layer i of L, of
    L + 1 for the embeddings; 0 for what is frozen. Arguments, shapes and errors as `trainable`.
    """
    names = _all_names(params)
    depth = 1 + max((_layer(name) for name in names if _layer(name) is not None), default=-1)

    def factor(name: str) -> float:
        if name.split("/")[0] in _EMBEDDINGS:
            return optim.layer_decay ** (depth + 1)
        layer = _layer(name)
        return 1.0 if layer is None else optim.layer_decay ** (depth - layer)

    return jax.tree.map(
        lambda x, trained: (x * trained).astype(np.float32),
        _by_name(factor, params),
        trainable(optim, params),
    )


# --- Parameters by name -------------------------------------------------------------------------


def _names(params: Any) -> Any:
    """The names of every array as a NumPy array: (), or (L, 1, ..) for stacked layers."""

    def names(path: Any, array: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("blocks/"):
            return np.array(name)
        of_layers = [f"blocks_{i}/{name.removeprefix('blocks/')}" for i in range(array.shape[0])]
        return np.array(of_layers).reshape(-1, *(1 for _ in array.shape[1:]))

    return jax.tree_util.tree_map_with_path(names, params)


def _all_names(params: Any) -> list[str]:
    return [str(name) for names in jax.tree.leaves(_names(params)) for name in names.flat]


def _by_name(value: Callable[[str], Any], params: Any) -> Any:
    """value(name) in place of the names."""
    return jax.tree.map(np.vectorize(value), _names(params))


def _layer(name: str) -> int | None:
    found = re.match(r"blocks_(\d+)/", name)
    return int(found[1]) if found else None


def _scale_by(factors: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Multiply updates by `factors` of their tree; where those are 0, NaN becomes 0 too."""

    def scaled(x: Array, factor: np.ndarray) -> Array:
        if not factor.any():
            return jnp.zeros_like(x)
        return jnp.where(factor == 0, jnp.zeros_like(x), x * jnp.asarray(factor, x.dtype))

    return optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, factors(updates)))
