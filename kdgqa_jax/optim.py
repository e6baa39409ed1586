"""Optimizers and learning rate schedules from a config."""

from collections.abc import Callable

import ml_collections
import optax

from kdgqa_jax.errors import UserError, unknown

SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "constant": lambda lr, warmup, steps: optax.join_schedules(
        [optax.linear_schedule(0.0, lr, warmup), optax.constant_schedule(lr)], [warmup]
    ),
    "cosine": lambda lr, warmup, steps: optax.warmup_cosine_decay_schedule(
        0.0 if warmup else lr, lr, warmup, max(steps, warmup + 1)
    ),
}
"""Learning rate by step, from (peak learning rate, warm-up steps, all steps)."""


def make_schedule(optim: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """The schedule of `config.optim` over `num_steps` updates. Raises UserError for a bad one."""
    if optim.schedule not in SCHEDULES:
        raise unknown("schedule", optim.schedule, SCHEDULES)
    if optim.learning_rate <= 0 or optim.warmup_steps < 0:
        raise UserError(
            f"optim.learning_rate={optim.learning_rate} must be positive and"
            f" optim.warmup_steps={optim.warmup_steps} not negative"
        )
    return SCHEDULES[optim.schedule](optim.learning_rate, optim.warmup_steps, num_steps)


def make_optimizer(
    optim: ml_collections.ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """AdamW as torch has it: decoupled weight decay on every parameter, as the paper's recipe."""
    return optax.adamw(
        make_schedule(optim, num_steps),
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
