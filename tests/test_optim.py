"""Optimizers against torch's, for both layouts of the layers; schedules against plain formulas."""

import functools
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import fast_jit, tiny_vit, vit_variables
from ml_collections import FrozenConfigDict

from kdgqa_jax import config, optim, tree_utils
from kdgqa_jax.errors import UserError

torch = pytest.importorskip("torch")

DEPTH = 2
EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed")


def optim_config(**changes):
    """The published recipe, but for changes."""
    return FrozenConfigDict({**config.train_config().optim.to_dict(), **changes})


@functools.cache
def start():
    """(parameters of a tiny ViT, unrolled; a function of their gradients by step)."""
    model = tiny_vit("gqa", depth=DEPTH)
    params = vit_variables(model, scale=0.1)["params"]

    @fast_jit
    def gradients(params, step):
        images = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (4, 8, 8, 1))
        labels = jax.random.randint(jax.random.key(2), (4,), 0, model.num_classes)

        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    return params, gradients


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def train(settings, gradients, steps, layout=tree_utils.unstack_layers):
    """(parameters by path, optimizer state) after some steps on the gradients of every step."""
    optimizer = optim.make_optimizer(settings, steps)
    params = layout(start()[0])
    state = jax.jit(optimizer.init)(params)

    @fast_jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for grads in gradients:
        params, state = update(params, state, layout(grads))
    return by_path(tree_utils.unstack_layers(params)), state


def torch_train(settings, gradients):
    """The same with torch: a group per parameter, by rules of this file's own."""
    parameters = {n: torch.tensor(x.copy()) for n, x in by_path(start()[0]).items()}

    def index(name):
        first = name.split("/")[0]
        if first in EMBEDDINGS:
            return 0
        return int(first[7:]) + 1 if first.startswith("blocks_") else DEPTH + 1

    def decay(name):
        excluded = {
            "none": (),
            "bias_and_norm": ("bias", "scale"),
            "bias_norm_and_embeddings": ("bias", "scale", "cls_token", "pos_embed"),
        }
        return not name.endswith(excluded[settings.weight_decay_exclude])

    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if not any(name.startswith(f"{prefix}/") for prefix in settings.freeze)
    }
    groups = [
        {
            "params": [parameter],
            "lr": settings.learning_rate * settings.layer_decay ** (DEPTH + 1 - index(name)),
            "weight_decay": settings.weight_decay * decay(name),
        }
        for name, parameter in trained.items()
    ]
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=settings.eps)
    for grads in gradients:
        grads = by_path(grads)
        for name, parameter in trained.items():
            parameter.grad = torch.tensor(grads[name])
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(list(trained.values()), settings.clip_norm)
        optimizer.step()
    return {name: parameter.numpy() for name, parameter in parameters.items()}


def gradients_of_twenty_steps():
    params, gradients = start()
    return [gradients(params, step) for step in range(20)]


# --- against torch ------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3])
def test_published_recipe_is_the_adamw_of_torch(learning_rate):
    """Twenty steps, each on gradients at the parameters that the steps before have left.

    torch computes in float64: in float32 it multiplies by 1 - 1e-7 each step, which that cannot
    hold, and so drifts by 2e-8 per step where parameters are about one.
    """
    settings = optim_config(learning_rate=learning_rate)
    params, gradients = start()
    optimizer = optim.make_optimizer(settings, 20)
    state = optimizer.init(params)
    peer = {name: torch.tensor(x).double() for name, x in by_path(params).items()}
    torch_optimizer = torch.optim.AdamW(
        peer.values(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )

    @fast_jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(20):
        grads = gradients(params, step)
        for name, grad in by_path(grads).items():
            peer[name].grad = torch.tensor(grad).double()
        torch_optimizer.step()
        params, state = update(params, state, grads)
    first = by_path(start()[0])
    for name, x in by_path(params).items():
        assert np.abs(x - first[name]).max() > learning_rate
        helpers.assert_close(x, peer[name].numpy(), 2e-6, scale=helpers.largest(first))


OPTIONS = {
    "clip": {"clip_norm": 0.1},
    "no_decay_of_biases": {"weight_decay_exclude": "bias_and_norm"},
    "no_decay_as_timm": {"weight_decay_exclude": "bias_norm_and_embeddings"},
    "layer_decay": {"layer_decay": 0.65},
    "freeze_a_layer": {"freeze": ("patch_embed", "blocks_0")},
    "freeze_all_layers": {"freeze": ("blocks_0", "blocks_1"), "layer_decay": 0.5},
    "everything": {
        "clip_norm": 0.1,
        "layer_decay": 0.75,
        "weight_decay_exclude": "bias_and_norm",
        "freeze": ("blocks_1",),
    },
}


@pytest.mark.parametrize("layout", [tree_utils.unstack_layers, tree_utils.stack_layers])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_those_of_torch(options, layout):
    settings = optim_config(learning_rate=1e-2, weight_decay=0.3, **options)
    gradients = gradients_of_twenty_steps()[:6]
    ours, _ = train(settings, gradients, 6, layout)
    theirs = torch_train(settings, gradients)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        helpers.assert_close(x, theirs[name], 3e-5)


def test_momentum_in_bfloat16_is_close():
    gradients = gradients_of_twenty_steps()[:6]
    exact, _ = train(optim_config(learning_rate=1e-3), gradients, 6)
    rounded, state = train(optim_config(learning_rate=1e-3, mu_dtype="bfloat16"), gradients, 6)
    assert {x.dtype for x in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}
    differences = [np.abs(rounded[name] - exact[name]).max() for name in exact]
    assert 0 < max(differences) < 3e-4


# --- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [tree_utils.unstack_layers, tree_utils.stack_layers])
def test_frozen_parameters_stay_bit_for_bit_even_where_gradients_are_nan(layout):
    settings = optim_config(
        learning_rate=1e-2, freeze=("blocks_[01]/attn/key", "blocks_1/mlp/*", "*_embed*"),
        clip_norm=0.1,
    )  # fmt: skip

    def is_frozen(name):
        return "/attn/key/" in name or "_embed" in name or name.startswith("blocks_1/mlp/")

    def poison(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x * np.nan if is_frozen(name) else x

    gradients = gradients_of_twenty_steps()[:2]
    poisoned = [jax.tree_util.tree_map_with_path(poison, grads) for grads in gradients]
    ours, state = train(settings, poisoned, 2, layout)
    params = start()[0]
    for name, x in by_path(params).items():
        assert np.array_equal(ours[name], x) == is_frozen(name), name
        assert np.isfinite(ours[name]).all()
    # Moments of what is frozen in all its layers do not exist.
    expected = {name for name in by_path(layout(params)) if not is_frozen(name)}
    assert set(by_path(state[2].inner_state.mu)) == expected


def test_names_are_those_of_unrolled_layers_in_both_layouts():
    settings = optim_config(freeze=("blocks_1/norm?", "head/bias"), layer_decay=0.5)
    unrolled, stacked = start()[0], tree_utils.stack_layers(start()[0])
    flags, factors = (
        [f(settings, tree) for tree in (unrolled, stacked)]
        for f in (optim.trainable, optim.learning_rate_factors)
    )
    assert flags[1]["blocks"]["norm1"]["scale"].tolist() == [[True], [False]]
    assert factors[1]["blocks"]["norm1"]["scale"].tolist() == [[0.25], [0.0]]
    assert factors[1]["blocks"]["mlp"]["fc1"]["kernel"].tolist() == [[[0.25]], [[0.5]]]
    assert factors[1]["cls_token"] == 0.125 and factors[1]["head"]["kernel"] == 1.0
    for of_unrolled, of_stacked in (flags, factors):
        of_stacked = jax.tree.map(
            lambda x, like: np.broadcast_to(x, like.shape), of_stacked, stacked
        )
        of_unrolled = jax.tree.map(
            lambda x, like: np.broadcast_to(x, like.shape), of_unrolled, unrolled
        )
        helpers.assert_close(tree_utils.unstack_layers(of_stacked), of_unrolled, 0)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (("patch_embed", "blocks_0/atn/*"), r"'blocks_0/atn/\*' matches no parameter; the nearest"),
        (("blocks_7",), "'blocks_7' matches no parameter; the nearest are blocks_"),
        (("blocks/*",), r"'blocks/\*' matches no parameter; the nearest are blocks_"),
        (("*",), "freezes every parameter"),
    ],
)
def test_bad_patterns_are_one_sentence(patterns, says):
    optimizer = optim.make_optimizer(optim_config(freeze=patterns), 1)
    for params in (start()[0], tree_utils.stack_layers(start()[0])):
        with pytest.raises(UserError, match=says):
            jax.eval_shape(optimizer.init, params)


def test_abstract_and_sharded_parameters(tmp_path):
    """State is made abstractly, then sharded, and lies as the parameters do; saved and restored."""
    from jax.sharding import PartitionSpec

    from kdgqa_jax import sharding, state_checkpoints

    settings = optim_config(**OPTIONS["everything"], schedule="cosine", mu_dtype="bfloat16")
    params = tree_utils.stack_layers(start()[0])
    optimizer = optim.make_optimizer(settings, 5)
    shapes = jax.eval_shape(optimizer.init, params)
    mesh = sharding.make_mesh()
    split = jax.sharding.NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(params, split)
    state = jax.jit(optimizer.init, out_shardings=split)(params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
    _, state = jax.jit(optimizer.update)(params, state, params)
    with state_checkpoints.StateCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    like = state_checkpoints.abstract(shapes, jax.tree.map(lambda _: split, shapes))
    with state_checkpoints.StateCheckpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# --- schedules and checks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("constant", {}, {0: 1.0, 99: 1.0}),
        ("constant", {"warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ("constant", {"cooldown_steps": 20}, {0: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ("cosine", {}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ("cosine", {"warmup_steps": 20}, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0, 999: 0.0}),
        ("cosine", {"final_fraction": 0.1}, {0: 1.0, 50: 0.55, 100: 0.1, 120: 0.1}),
        (
            "linear",
            {"warmup_steps": 50, "final_fraction": 0.2},
            {25: 0.5, 50: 1, 75: 0.6, 100: 0.2},
        ),
        ("rsqrt", {"warmup_steps": 10, "decay_steps": 30}, {5: 0.5, 10: 1.0, 100: 0.5}),
        ("rsqrt", {"decay_steps": 30, "cooldown_steps": 20}, {90: 0.25, 100: 0.0}),
        ("step", {"decay_steps": 30}, {0: 1.0, 29: 1.0, 30: 0.1, 60: 0.01, 90: 0.001}),
        ("step", {"decay_steps": 30, "final_fraction": 0.05}, {30: 0.1, 60: 0.05}),
        ("exponential", {"decay_steps": 50, "decay_rate": 0.25}, {0: 1.0, 25: 0.5, 100: 0.0625}),
    ],
)
def test_schedules(name, changes, expected):
    schedule = optim.make_schedule(optim_config(schedule=name, learning_rate=2.0, **changes), 100)
    jitted = jax.jit(schedule)
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(2.0 * value, abs=1e-6)
        assert float(jitted(jnp.int32(step))) == pytest.approx(2.0 * value, abs=1e-6)


def test_every_schedule_works_where_the_warmup_is_longer_than_the_run():
    for name in optim.SCHEDULES:
        schedule = optim.make_schedule(optim_config(schedule=name, warmup_steps=10), 1)
        assert all(math.isfinite(schedule(step)) for step in range(12))


def test_layer_decay_and_schedule_reach_the_updates():
    """Where all gradients are one, the first update of Adam is the learning rate."""
    settings = optim_config(
        learning_rate=1.0, weight_decay=0.0, layer_decay=0.5, schedule="linear", eps=1e-30
    )
    optimizer = optim.make_optimizer(settings, 4)
    params = start()[0]
    ones = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    update = fast_jit(optimizer.update)
    for step in range(4):
        updates, state = update(ones, state, params)
        rate = 1.0 - step / 4
        helpers.assert_close(updates["head"]["bias"], -rate, 1e-4)
        helpers.assert_close(updates["blocks_0"]["norm1"]["bias"], -rate / 4, 1e-4)
        helpers.assert_close(updates["pos_embed"], -rate / 8, 1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"weight_decay_exclude": "norm"}, "unknown weight_decay_exclude 'norm'"),
        ({"mu_dtype": "float16"}, "unknown mu_dtype 'float16': did you mean 'bfloat16'"),
        ({"learning_rate": math.nan}, "optim.learning_rate=nan must be positive"),
        ({"warmup_steps": -1}, "optim.warmup_steps=-1 must be 0 or more"),
        ({"beta2": 1.0}, "optim.beta2=1.0 must be at least 0 and below 1"),
        ({"layer_decay": 1.5}, "optim.layer_decay=1.5 must be above 0 and at most 1"),
        ({"final_fraction": 2.0}, r"optim.final_fraction=2.0 must be in 0..1"),
        ({"decay_steps": 0}, "optim.decay_steps=0 must be positive"),
    ],
)
def test_bad_values_are_one_sentence(changes, says):
    for make in (optim.make_schedule, optim.make_optimizer):
        with pytest.raises(UserError, match=says):
            make(optim_config(**changes), 10)
