"""The configs of the paper's jobs: complete, checked, and their full-size training steps traced."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers import DGQA, VARIANTS

from kdgqa_jax import (
    aot,
    checkpoint,
    cli,
    config,
    fitting,
    grid,
    initial,
    sharding,
    study_checks,
    train,
    train_step,
    tree_utils,
    vit,
)
from kdgqa_jax.configs import _recipes, sweep
from kdgqa_jax.data import augment, sources
from kdgqa_jax.errors import UserError

MODELS = {  # parameters at 1000 classes as timm counts them, D, L, N
    "S/16": (22_050_664, 384, 12, 6),
    "B/16": (86_567_656, 768, 12, 12),
    "L/16": (304_326_632, 1024, 24, 16),
}
FINETUNED = {"cifar10": 10, "cifar100": 100, "food101": 101, "tiny_imagenet": 200}
JOBS = {  # classes
    "uptrain": 1000,
    **{f"finetune:dataset={name}": classes for name, classes in FINETUNED.items()},
    "pretrain": 1000,
}


def config_name(job, recipe, model, attention):
    return f"{job}{',' if ':' in job else ':'}model={model},attention={attention},recipe={recipe}"


def load(name):
    settings = config.load_config(name)
    if settings.init is None:
        settings.init = "converted"
    return settings


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


STUDIES = (
    *("demo", "demo:dataset=fashion_mnist", "pooling:kv=2", "fashion_mnist"),
    *("dinov2", "dinov2:data=fashion_mnist", "dinov2:part=finetune"),
    "dinov2:part=finetune,target=fashion_mnist",
    *(f"sweep:of={name}" for name in sweep.SWEEPS),
)


def test_every_config_of_a_study_is_in_the_list():
    named = {name.partition(":")[0] for name in STUDIES}
    assert named == {n for n in config.config_names() if "variants" in config.load_config(n)}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_dry_run_with_an_estimate(capsys, name):
    """Without data, model or workdir."""
    assert cli.main(["study", "--config", name, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert " cells, " in shown and "estimate, by declared rates: " in shown
    for cell in grid.cells(config.load_config(name)):
        assert cell.name.split(",")[0].split(" ")[0] in shown


@pytest.fixture
def empty(monkeypatch):
    """Black images of the size of a data set, whose files need not be there."""

    def load(name, data_dir="", shift="none"):
        row = sources.SOURCES[name]
        size, names = row.native_size or (9, 9, 3), row.class_names
        names = names if isinstance(names, tuple) else ("a",) * row.num_classes
        split = sources.ArraySplit(np.zeros((900, *size), np.uint8), np.zeros(900, np.int32))
        return sources.Dataset(name, names, split, split, size)

    monkeypatch.setattr(sources, "load", load)


@pytest.mark.parametrize("name", [name for name in STUDIES if "dinov2" not in name])
def test_every_config_of_a_study_can_be_run(empty, name):
    settings = config.load_config(name)
    study_checks.check_fields(settings)
    described = study_checks.check(settings, grid.cells(settings), study_checks.Datasets())
    assert {what.split(",")[0] for what in described} >= {"pretrain data", "uptrain data"}


@pytest.mark.parametrize("part", ["probe", "finetune"])
def test_studies_of_a_given_model_can_be_run(empty, tmp_path, part):
    """A model with six heads and another size, in the place of the pretrained one."""
    arguments = {"name": "mu/14", "num_heads": 6, "width": 12, "depth": 1, "image_size": 28}
    made = vit.create(**arguments, num_classes=0)
    variables = jax.device_get(vit.init_variables(made, jax.random.key(0)))
    about = {"model": {**arguments, "num_classes": 0}, "channels": 3, "class_names": [],
             "preprocessing": {}}  # fmt: skip
    checkpoint.save_model(tmp_path / "model", variables, about)
    settings = config.load_config(f"dinov2:part={part},init={tmp_path / 'model'}")
    described = study_checks.check(settings, grid.cells(settings), study_checks.Datasets())
    names = {"probe": set(), "finetune": {"tuxpaint_stamps"}}[part]
    assert {d.name for n, d in described.items() if n.startswith("finetune")} == names
    with pytest.raises(UserError, match=r"pretrain: .*nowhere"):
        settings.pretrain.init = str(tmp_path / "nowhere")
        study_checks.check(settings, grid.cells(settings), study_checks.Datasets())


@pytest.mark.parametrize("recipe", _recipes.RECIPES)
@pytest.mark.parametrize("job", JOBS)
def test_every_config_can_be_run(job, recipe):
    for model, attention in itertools.product(MODELS, VARIANTS):
        settings = load(config_name(job, recipe, model, attention))
        config.check_fields(settings, config.train_config())
        train.check(settings)
        built = initial.build_model(settings, JOBS[job])
        _, width, depth, heads = MODELS[model]
        assert (built.width, built.depth, built.image_shape) == (width, depth, (224, 224))
        assert built.attention.variant == attention and built.scan_layers is None
        assert built.attention.num_heads == heads
        assert built.attention.num_kv_heads == (heads if attention == "mha" else heads // 2)
        assert sources.SOURCES[settings.data.name].num_classes == JOBS[job]
        steps = settings.epochs * _recipes.DATA[settings.data.name].images / settings.batch_size
        assert settings.optim.warmup_steps < 0.1 * steps


# What happens to images is the same for all models: its largest part is traced once per batch size.
traced_once = jax.jit(augment.rand_augment, static_argnums=(2, 3))


def cells():
    """Every model x variant; recipes and jobs come up in turn, so that each pair is met."""
    jobs, recipes = list(JOBS), list(_recipes.RECIPES)
    for (m, model), (a, attention) in itertools.product(enumerate(MODELS), enumerate(VARIANTS)):
        yield jobs[(a + 2 * m) % len(jobs)], recipes[(a + m) % len(recipes)], model, attention


def test_every_pair_of_job_recipe_model_and_variant_is_among_the_cells():
    """But for jobs with variants, of which there are as many pairs as there are all cells twice."""
    axes = list(JOBS), list(_recipes.RECIPES), list(MODELS), list(VARIANTS)
    for i, j in ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3)):
        assert {(c[i], c[j]) for c in cells()} == set(itertools.product(axes[i], axes[j]))


@pytest.mark.slow
@pytest.mark.parametrize(("job", "recipe", "model", "attention"), list(cells()))
def test_full_size_training_step_is_built_abstractly(monkeypatch, job, recipe, model, attention):
    monkeypatch.setattr(augment, "rand_augment", traced_once)
    settings, classes = load(config_name(job, recipe, model, attention)), JOBS[job]
    step, state, batch = aot.abstract_train_step(settings, classes)
    new_state, metrics = jax.eval_shape(step, state, batch)

    def kind(x):
        return x.shape, x.dtype

    assert jax.tree.map(kind, new_state) == jax.tree.map(kind, state)
    whole, width, depth, heads = MODELS[model]
    kv_heads = heads if attention == "mha" else heads // 2
    head_width = width // heads
    of_kv_head = 2 * depth * (width + 1) * head_width  # keys and values, kernels and biases
    expected = whole - (1000 - classes) * (width + 1) - (heads - kv_heads) * of_kv_head
    num_params, num_kv_params = tree_utils.count_parameters(state.params)
    assert num_params == count(state.params) == expected
    assert num_kv_params == kv_heads * of_kv_head
    assert state.params["head"]["bias"].shape == (classes,)
    assert metrics["loss"].shape == () and metrics["allocation"].shape == (depth, kv_heads)
    assert bool(state.norm_stats) == (attention in DGQA)
    assert count(state.ema) == (num_params if recipe == "modern" else 0)


@pytest.mark.parametrize("model", MODELS)
def test_pretrained_models_have_the_known_number_of_parameters(model):
    settings = load(f"pretrain:model={model}")
    assert settings.model.attention == "mha"
    built = initial.build_model(settings, 1000)
    shapes = jax.eval_shape(lambda: vit.init_variables(built, jax.random.key(0)))
    assert count(shapes["params"]) == MODELS[model][0]


@pytest.mark.parametrize(("kv", "kept"), [(1, 1 / 6), (2, 1 / 3), (3, 1 / 2), (6, 1.0)])
def test_fewer_key_value_heads_have_fewer_parameters(kv, kept):
    built = initial.build_model(load(f"uptrain:model=S/16,attention=gqa,kv={kv}"), 1000)
    shapes = jax.eval_shape(lambda: vit.init_variables(built, jax.random.key(0)))
    all_heads = 2 * 12 * (384 + 1) * 384
    assert tree_utils.count_parameters(shapes["params"])[1] == pytest.approx(kept * all_heads)


def test_published_recipe_is_that_of_the_paper():
    for name, epochs, best in (("uptrain", 1, ""), ("finetune", 5, "top1")):
        settings = load(f"{name}:attention=dgqa_ema")
        optim, data = settings.optim, settings.data
        assert (settings.epochs, settings.keep_best, settings.batch_size) == (epochs, best, 32)
        assert (optim.learning_rate, optim.schedule, optim.warmup_steps) == (1e-5, "constant", 0)
        assert (optim.weight_decay, optim.weight_decay_exclude) == (0.01, "none")
        assert (optim.beta1, optim.beta2, optim.eps, optim.clip_norm) == (0.9, 0.999, 1e-8, 0.0)
        assert optim.layer_decay == 1.0 and settings.ema_decay == 0.0
        assert settings.accumulate == 1
        assert (data.resize, data.mean, data.std) == ("squash", 0.5, 0.5)
        assert (data.augment.rand_augment_ops, data.augment.rand_augment_magnitude) == (2, 9)
        rest = ("flip", "pad_crop", "erase", "mixup", "cutmix", "label_smoothing")
        assert not any(data.augment[field] for field in rest) and data.augment.resized_crop == 1.0
        assert settings.model.dtype == "float32" and settings.model.drop_path == 0.0
        assert settings.model.window == 300 and settings.seed == 42
    assert load("uptrain").data.name == "imagenet2012"


@pytest.mark.parametrize("name", ["uptrain", "finetune"])
def test_modern_recipe_scales_the_published_learning_rate(name):
    settings = load(f"{name}:recipe=modern")
    assert settings.optim.learning_rate == pytest.approx(1e-5 * settings.batch_size / 32)


@dataclasses.dataclass(frozen=True)
class Described:
    """What is known of a device that is not there."""

    device_kind: str

    def memory_stats(self):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class DescribedMesh:
    """What the number of parts depends on."""

    kind: str
    sizes: tuple[int, int, int]

    @property
    def shape(self):
        return dict(zip(sharding.AXES, self.sizes, strict=True))

    @property
    def devices(self):
        return np.array([Described(self.kind)])


@pytest.mark.parametrize(
    ("name", "kind", "mesh", "parts"),
    [
        ("uptrain:model=S/16", "cpu", (1, 1, 1), 1),  # says nothing of its memory
        ("uptrain:model=S/16", "NVIDIA H100 80GB HBM3", (1, 1, 1), 1),
        ("uptrain:model=L/16", "NVIDIA H100 80GB HBM3", (1, 1, 1), 4),
        ("uptrain:model=L/16", "NVIDIA H200", (1, 1, 1), 2),
        ("uptrain:model=B/16", "TPU v5 lite", (1, 1, 1), 8),
        ("uptrain:model=B/16", "TPU v5 lite", (16, 1, 1), 1),
        ("uptrain:model=L/16", "TPU v5 lite", (4, 1, 1), 8),
        ("uptrain:model=L/16", "TPU v5 lite", (1, 4, 1), 4),  # more is left beside the state
        ("pretrain:model=L/16", "TPU v6 lite", (4, 1, 1), 2),
        ("uptrain:model=L/16", "TPU v5 lite", (512, 1, 1), 1),
        ("uptrain:model=L/16,batch=16384", "TPU v5 lite", (512, 1, 1), 1),
        ("finetune:model=L/16,batch=512", "TPU v5 lite", (512, 1, 1), 1),
    ],
)
def test_parts_of_a_batch_follow_from_what_fits_a_device(name, kind, mesh, parts):
    settings = load(f"{name},recipe=modern")
    model, mesh = initial.build_model(settings, 1000), DescribedMesh(kind, mesh)
    largest = fitting.microbatch(model, train_step.step_config(settings), mesh)
    given = (settings.batch_size, mesh, settings.accumulate, largest)
    assert sharding.microbatches(*given) == parts
    sharding.check_batch_size("eval_batch_size", settings.eval_batch_size, mesh)


def test_the_learning_rate_follows_the_batch_and_warm_up_stays_in_epochs():
    own, larger = (load(f"uptrain:recipe=modern,batch={n}") for n in (0, 4096))
    assert larger.batch_size == 4 * own.batch_size == 4096
    assert larger.optim.learning_rate == pytest.approx(4 * own.optim.learning_rate)
    assert larger.optim.warmup_steps == round(own.optim.warmup_steps / 4)
    assert load("uptrain:batch=8").optim.learning_rate == pytest.approx(1e-5 / 4)


def test_a_recipe_that_cannot_be_split_says_what_can():
    mesh = DescribedMesh("TPU v5 lite", (512, 1, 1))
    settings = load("finetune:model=L/16,recipe=modern")
    with pytest.raises(UserError, match=r"batch_size=256 must .* 512 .*; batch_size=512 is one"):
        sharding.check_batch_size("batch_size", settings.batch_size, mesh)


def test_parts_are_the_fewest_that_fit():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)  # a batch is split over four
    for per_device, at_least, largest in itertools.product((1, 6, 7, 12), (1, 2, 3), (0, 1, 4, 5)):
        if per_device % at_least:
            continue
        fits = [
            n
            for n in range(at_least, per_device + 1)
            if per_device % n == 0 and (per_device / n <= largest or not largest)
        ]
        assert sharding.microbatches(4 * per_device, mesh, at_least, largest) == fits[0]
    assert sharding.microbatches(4 * 99_999_989, mesh, 1, 512) == 99_999_989  # a prime


def test_images_are_mirrored_where_that_changes_nothing():
    assert load("finetune:dataset=cifar10,recipe=modern").data.augment.flip
    assert not load("finetune:dataset=mnist,recipe=modern").data.augment.flip


def test_data_sets_are_those_that_can_be_read():
    assert set(_recipes.DATA) <= set(sources.SOURCES)
    assert len(sources.load("digits").train) == _recipes.DATA["digits"].images


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("finetune:dataset=cifar", "unknown data set 'cifar': did you mean 'cifar10'?"),
        ("uptrain:recipe=moderne", "unknown recipe 'moderne': did you mean 'modern'?"),
        ("pretrain:model=X/16", "unknown model 'X/16': valid: mu/PATCH"),
        ("uptrain:attention=dgqa_em", "unknown attention variant 'dgqa_em': did you mean 'dgqa_e"),
        ("testing:attention=kgqa", "unknown attention variant 'kgqa': did you mean 'kdgqa'?"),
        ("uptrain:attention=gqa,kv=4", "num_kv_heads=4 does not divide the 6 query heads"),
        ("uptrain:batch=-1", "config argument batch=-1 must be positive"),
        ("uptrain:kv=many", "config argument 'kv=many' must be a int"),
        ("uptrain:atention=gqa", "unknown config argument 'atention': did you mean 'attention'?"),
        ("_recipes", "unknown config '_recipes'"),
        ("uptrain", "config field init is not set"),
        ("finetune", "config field init is not set"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, tmp_path, name, says):
    assert cli.main(["train", "--config", name, "--workdir", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_a_config_starts_from_is_given_on_the_command_line():
    settings = config.override(config.load_config("uptrain"), ["--config.init=converted"])
    assert settings.init == "converted"
    train.check(settings)
    settings.init = ""  # new weights, asked for
    train.check(settings)


@pytest.mark.slow
def test_testing_config_learns_in_seconds(tmp_path):
    settings = config.load_config("testing:attention=dgqa_ema,kv=2")
    result = train.train_and_evaluate(settings, tmp_path)
    assert result["steps"] == 90 and result["top1"] > 50.0
    assert np.shape(result["allocation"]) == (4, 2)


def test_names_that_begin_with_an_underscore_are_no_configs():
    names = config.config_names()
    assert {"demo", "finetune", "pooling", "pretrain", "testing", "uptrain"} <= set(names)
    assert not any(name.startswith("_") for name in names)
    with pytest.raises(UserError, match="unknown config"):
        config.load_config("_recipes")
