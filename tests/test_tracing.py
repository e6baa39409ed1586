"""What JAX does with our functions before they run: symbolic shapes, strict promotion."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kdgqa_jax import analysis, evaluate, sharding, train_step, tree_utils, vit
from kdgqa_jax import config as configs

OPTIONS = {"kdgqa-example": {"allocation_scope": "example"}, "pgqa": {"noise_at_eval": True}}
MODELS = [(name, scan) for name in (*helpers.VARIANTS, "kdgqa-example") for scan in (False, True)]
every_model = pytest.mark.parametrize(("name", "scan"), MODELS)


WITHOUT_RANDAUGMENT = {"data.augment.rand_augment_ops": 0}  # the same for all models: traced once


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def tiny(name, **options):
    return helpers.tiny_vit(name.split("-")[0], **OPTIONS.get(name, {}), **options)


@functools.cache
def model_and_variables(name, scan):
    depth = 2 if scan else 1  # unrolled layers compile one by one
    variables = helpers.vit_variables(tiny(name, depth=depth))
    if scan:
        variables = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
    return tiny(name, depth=depth, scan_layers=scan), variables


@every_model
def test_exports_with_a_symbolic_batch(name, scan):
    model, variables = model_and_variables(name, scan)
    apply = jax.jit(functools.partial(vit.apply_in_evaluation, model))
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch,), jnp.bool)
    exported = export.export(apply)(abstract(variables), images, mask)
    for size in (1, 3):
        given = variables, helpers.images(size), np.arange(size) < 2
        found, expected = exported.call(*given), apply(*given)
        assert found[0].shape == (size, 5)
        if model.attention.variant == "kdgqa":
            norms = tree_utils.grouping_of(expected[1])["key_norm"]
            helpers.assert_away_from_ties("kdgqa", norms, 6)
        helpers.assert_close(found, expected, 1e-5)


def test_evaluation_step_and_capture_export_with_a_symbolic_batch():
    model, variables = model_and_variables("kdgqa-example", False)
    (batch,) = export.symbolic_shape("batch")
    step = evaluate.make_eval_step(model, 0.5, 0.5)
    capture = jax.jit(lambda *given: vars(analysis.capture(model, *given)))

    def pixels(size):  # of another size than the model's: they are resized
        rng = np.random.default_rng(0)
        image = rng.integers(0, 256, (size, 9, 9, 1), dtype=np.uint8)
        return {"image": image, "label": np.zeros(size, np.int32), "mask": np.ones(size, bool)}

    for function, batch_of in ((step, pixels), (capture, helpers.images)):
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), batch_of(1)
        )
        exported = export.export(function)(abstract(variables), shapes)
        given = variables, batch_of(3)
        helpers.assert_close(exported.call(*given), function(*given), 1e-5)


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def trace_training(model, **fields):
    """Trace initialisation and a training step; promotion is decided there, and nowhere else."""
    config = configs.train_config()
    config.update_from_flattened_dict(fields)
    state = jax.eval_shape(
        lambda rng: train_step.init_state(vit.init_variables(model, rng, 1), config, rng),
        jax.random.key(0),
    )
    mesh = sharding.make_mesh()
    step = train_step.make_train_step(model, train_step.step_config(config), 10, mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 9, 9, 1), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    jax.eval_shape(step, state, batch)
    return state, {**batch, "mask": jax.ShapeDtypeStruct((4,), jnp.bool)}


@every_model
def test_strict_promotion_in_training_and_evaluation(strict, name, scan):
    model = tiny(name, scan_layers=scan, dropout=0.1, attn_dropout=0.1, drop_path=0.1)
    fields = {"accumulate": 2 if scan else 1, "ema_decay": 0.9, **WITHOUT_RANDAUGMENT}
    state, batch = trace_training(model, **fields)
    jax.eval_shape(evaluate.make_eval_step(model, 0.5, (0.5,)), state.variables, batch)


@pytest.mark.parametrize(
    "options",
    [
        {"importance": "variance", "expansion": "gather", "min_heads_per_group": 1},
        {"importance": "max_norm", "allocation_scope": "example", "expansion": "gather"},
        {"importance": "gradient", "distillation": "head", "remat": "full"},
        {"attention": "pgqa", "noise_target": "output", "noise_statistics": "mean_std"},
        {"attention": "dgqa_ema", "pool": "avg", "class_token": False, "representation_size": 6},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_strict_promotion_with_options_of_the_model(strict, options):
    model = helpers.tiny_vit(**{"attention": "kdgqa", **options})
    state, batch = trace_training(model, **WITHOUT_RANDAUGMENT)
    jax.eval_shape(evaluate.make_eval_step(model, 0.5, 0.5), state.variables, batch)


@pytest.mark.parametrize(
    "augment",
    [
        {"flip": True, "pad_crop": 2, "erase": 0.5, "mixup": 0.2, "label_smoothing": 0.1},
        {"resized_crop": 0.5, "rand_augment_ops": 0, "mixup": 0.2, "cutmix": 1.0},
    ],
    ids=["rand-augment", "resized-crop"],
)
def test_strict_promotion_with_augmentation_and_options_of_the_optimizer(strict, augment):
    trace_training(
        helpers.tiny_vit("gqa"),
        **{f"data.augment.{name}": value for name, value in augment.items()},
        **{
            "optim.schedule": "cosine",
            "optim.warmup_steps": 2,
            "optim.cooldown_steps": 2,
            "optim.clip_norm": 1.0,
            "optim.layer_decay": 0.5,
            "optim.freeze": ("patch_embed/*",),
            "optim.weight_decay_exclude": "bias_and_norm",
            "optim.mu_dtype": "bfloat16",
        },
    )
