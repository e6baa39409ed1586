"""What a training run starts from: new weights, or another model with what belongs to it.

A model given by `config.init` brings its architecture and the preprocessing of its images. Fields
of the config that stand at their defaults follow it; those that were set are kept: another variant,
number of key/value heads or image size converts it, another architecture is refused.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections

from kdgqa_jax import checkpoint, convert, options, paths, tree_utils, vit
from kdgqa_jax import config as config_lib
from kdgqa_jax import workdir as workdir_lib
from kdgqa_jax.data import pipeline
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads import grouping
from kdgqa_jax.options import ARCHITECTURE, CONVERSION, PROGRAM, RUN


def _options(*roles: str) -> tuple[str, ...]:
    """The options of models in these roles."""
    return options.names(vit.known_options(), *roles)


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """What a run starts from.

    Attributes:
      model: arguments of `vit.create`.
      preprocessing: fields of `config.data` that belong to the model.
      notes: lines for the user.
      variables: of the model, NumPy arrays; None: new ones.
    """

    model: dict[str, Any]
    preprocessing: dict[str, Any]
    notes: tuple[str, ...] = ()
    variables: dict[str, Any] | None = None

    def build(self) -> vit.VisionTransformer:
        """The model. Raises UserError for options that do not fit together."""
        return vit.create(**self.model)


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> vit.VisionTransformer:
    """The model of `config.model`. Raises UserError for options that do not fit together."""
    return vit.create(**config.model.to_dict(), num_classes=num_classes)


def load(config: ml_collections.ConfigDict, num_classes: int, channels: int) -> InitialModel:
    """What `config` starts from, for a data set.

    Args:
      config: the fields of `config.train_config()`.
      num_classes: of the data set; a model for another number gets a new class head.
      channels: of its images; a model for another number gets its patch embedding fitted.

    Raises:
      UserError: no model there, or one that does not fit the fields that were set.
    """
    preprocessing = {name: config.data[name] for name in pipeline.PREPROCESSING}
    if not config.init:
        model = {**config.model.to_dict(), "num_classes": num_classes}
        return InitialModel(model, preprocessing)
    asked = _asked(config)
    converted, of_the_run = _options(CONVERSION), _options(RUN, PROGRAM)
    found = convert.load(
        config.init,
        num_classes=num_classes,
        channels=channels,
        **{name: asked[name] for name in converted if name in asked},
    )
    model = found.description["model"]
    _check_architecture(config.init, model, found.model, asked)
    followed = {
        name: value
        for name, value in model.items()
        if name in config.model and name not in asked and name not in of_the_run
        if value != config.model[name]
    }
    model = {
        **model,
        **{k: v for k, v in asked.items() if k not in ("name", *converted)},
        **{name: config.model[name] for name in of_the_run},
    }
    theirs = follow_preprocessing(config.data, found.description["preprocessing"])
    followed |= theirs
    preprocessing |= theirs
    built = vit.create(**model)
    memory = found.variables.get("norm_stats", {})
    memory, _ = grouping.fit_norm_stats(found.model, memory, built)
    params = tree_utils.cast(found.variables["params"], built.param_dtype)
    layout = tree_utils.stack_layers if built.scan_layers else tree_utils.unstack_layers
    variables = {"params": layout(params), "norm_stats": layout(memory)}
    attention = found.model.attention
    notes = [
        f"starting from {config.init}: {attention.variant} with {attention.num_kv_heads}"
        f" key/value heads for {attention.num_heads} query heads"
    ]
    notes += found.report.notes
    changed = [(n, e.how) for n, e in found.report.origins.items() if n == "pos_embed" and e.how]
    notes += [f"{name}: {'; '.join(how)}" for name, how in changed]
    there, here = (jnp.dtype(m.param_dtype).name for m in (found.model, built))
    if there != here:
        notes.append(f"parameters cast from {there} to {here} (config.model.param_dtype)")
    if followed:
        notes.append(f"taken over: {', '.join(f'{k} {v}' for k, v in followed.items())}")
    return InitialModel(model, preprocessing, tuple(notes), variables)


def follow_preprocessing(data: ml_collections.ConfigDict, theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config.data` that a model's own preprocessing changes: none that were set."""
    defaults = config_lib.train_config().data
    changed = {}
    for name in pipeline.PREPROCESSING:
        if name in theirs and data[name] == defaults[name] and theirs[name] != data[name]:
            plain = _plain(theirs[name])
            if plain != data[name]:
                changed[name] = plain
    return changed


def _plain(statistic: Any) -> Any:
    """The same number for each channel as one number."""
    if isinstance(statistic, list | tuple):
        same = len(set(statistic)) == 1
        return float(statistic[0]) if same else tuple(statistic)
    return statistic


def _asked(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The fields of `config.model` that were set, and that a model to start from has too."""
    defaults, of_the_run = config_lib.train_config().model, _options(RUN, PROGRAM)
    return {
        name: value
        for name, value in config.model.items()
        if value != defaults[name] and name not in of_the_run
    }


def check(config: ml_collections.ConfigDict, init: str, model: dict[str, Any]) -> None:
    """Raise UserError unless `config` can start from a model with these arguments of `vit.create`.

    `init` is what errors call that model, which need not be there yet.
    """
    _check_architecture(init, model, vit.create(**model), _asked(config))


def _check_architecture(
    init: str, model: dict[str, Any], found: vit.VisionTransformer, asked: dict[str, Any]
) -> None:
    """Raise UserError if fields that were set contradict the model that was found."""
    wrong = [
        f"{name} is {model.get(name)!r} there, {asked[name]!r} here"
        for name in _options(ARCHITECTURE)
        if name in asked and model.get(name, asked[name]) != asked[name]
    ]
    if "name" in asked and asked["name"] != model["name"]:
        models = found, vit.create(asked["name"], image_size=found.image_size)
        for field in ("width", "depth", "mlp_width", "patch_size"):
            there, here = (vit.arguments(model)[field] for model in models)
            if there != here:
                wrong.append(f"{field} is {there} there, {here} in {asked['name']}")
    if wrong:
        raise UserError(
            f"the model in {init} does not fit config.model: {'; '.join(wrong)}; leave these"
            " fields out to take them over"
        )


RECORD = "start.json"


def write(initial: InitialModel, workdir: paths.Path) -> None:
    """Keep what a run started from, so that it can resume without the other model."""
    fields = ("model", "preprocessing")
    workdir_lib.write_json(workdir / RECORD, {name: getattr(initial, name) for name in fields})


def read(workdir: paths.Path, config: ml_collections.ConfigDict) -> InitialModel | None:
    """What a run has started from, to be run as `config` has it now; None: from nothing."""
    path = workdir / RECORD
    if not path.exists():
        return None
    initial = InitialModel(**workdir_lib.read_json(path))
    program = {name: config.model[name] for name in _options(PROGRAM)}
    return dataclasses.replace(initial, model={**initial.model, **program})


def check_shapes(init: str, variables: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise UserError unless the variables have the shapes and dtypes of a model's own."""
    what = f"the model in {init} does not fit config.model"
    checkpoint.check_arrays(what, variables, expected)
