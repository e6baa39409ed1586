"""What can be known of a study before its first stage: mistakes that would show hours later."""

from typing import Any, TypeAlias

import jax
import ml_collections

from kdgqa_jax import config as config_lib
from kdgqa_jax import grid, initial, optim, options, probes, train, vit
from kdgqa_jax import stages as stages_lib
from kdgqa_jax.data import pipeline, sources, subsets
from kdgqa_jax.errors import UserError, check_seed, unknown
from kdgqa_jax.grid import SECTIONS, STAGES, Cell

Config: TypeAlias = ml_collections.ConfigDict


class Datasets:
    """The whole data sets of a study, each loaded once.

    Args:
      declared: count the images of a set that is not here by `sources.SOURCES`.
    """

    def __init__(self, declared: bool = False):
        self._found: dict[tuple[str, ...], sources.Dataset] = {}
        self._declared = declared

    def of(self, data: Config) -> sources.Dataset:
        """That of a section `data`. Raises UserError: what `sources.load` raises."""
        key = (data.name, data.data_dir, data.shift)
        if key not in self._found:
            self._found[key] = sources.load(*key)
        return self._found[key]

    def sizes(self, data: Config) -> tuple[int, int]:
        """(training images, test images) of a run on a section `data`.

        Raises UserError: what `sources.load` raises, or a share out of range.
        """
        subsets.check(data)
        try:
            dataset = self.of(data)
            train_images, test_images = len(dataset.train), len(dataset.test)
        except UserError:
            known = sources.find_source(data.name)[0].images
            if not self._declared or known is None:
                raise
            train_images, test_images = known
        counts = (train_images, data.train_share), (test_images, data.test_share)
        return tuple(subsets.size(images, share) for images, share in counts)


def check_fields(study: Config) -> None:
    """Raise UserError for fields of a study that are bad in themselves."""
    if "variants" not in study:
        raise UserError("this config is one of a single run: kdgqa train --config ...")
    config_lib.check_fields(study, config_lib.study_config())
    if study.seeds < 1 or not study.variants:
        raise UserError(f"seeds={study.seeds} and variants={study.variants} must not be empty")
    for seed in (study.seed, study.seed + study.seeds - 1):
        check_seed(seed)
    if study.calibration_images < 1:
        raise UserError(f"calibration_images={study.calibration_images} must be at least 1")
    for name in study.probes:
        probes.check(name)
    for name in study.probed:
        if name not in STAGES:
            raise unknown("stage in probed", name, STAGES)


def check(study: Config, cells: list[Cell], datasets: Datasets) -> dict[str, sources.Dataset]:
    """The data of a study by what they are for: "pretrain data", with settings that matter to them.

    Raises UserError for what would be found out hours later.
    """
    described: dict[str, sources.Dataset] = {}
    checked: dict[tuple, dict[str, Any]] = {}
    for cell in cells:
        if cell.seed != study.seed:  # all seeds have the same configs
            continue
        settings = cell.applied(study)
        base_settings = cell.until("pretrained").settings
        if base_settings not in checked:
            with _named("pretrain", base_settings):
                checked[base_settings] = _check_pretrained(settings, datasets)
        base = checked[base_settings]
        _check_kept(settings, datasets, base)
        for section in dict.fromkeys(SECTIONS.values()):
            if section == "finetune" and not settings.finetune.epochs:
                continue
            with _named(section, cell.settings):
                if section != "pretrain":
                    _check_section(settings, section, cell, base, datasets)
            described[_data_name(section, cell)] = datasets.of(settings[section].data)
        if settings.finetune.epochs:
            finetune = settings.finetune.copy_and_resolve_references()
            finetune.model.attention = "mha"
            initial.check(finetune, "uptrain.model", {**base, "attention": "mha"})
    return described


class _named:
    """Errors in the block begin with the section, and with the settings that lead to them."""

    def __init__(self, section: str, settings: tuple[tuple[str, str], ...]):
        shown = ", ".join(f"{field}={text}" for field, text in settings)
        self._name = f"{section} ({shown})" if shown else section

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise UserError(f"{self._name}: {error}") from None


def _data_name(section: str, cell: Cell) -> str:
    own = [f"{f}={v}" for f, v in cell.settings if f.startswith(("data.", f"{section}.data."))]
    return ", ".join([f"{section} data", *own])


def _check_pretrained(settings: Config, datasets: Datasets) -> dict[str, Any]:
    """Arguments of `vit.create` for the pretrained model. Raises UserError if there can be none."""
    config = settings.pretrain.copy_and_resolve_references()
    config.model.attention, config.model.num_kv_heads, config.seed = "mha", None, settings.seed
    given = config.epochs == 0
    if given and not config.init:
        raise UserError(
            "epochs=0 takes a model as it is; say which one, --config.pretrain.init=DIR"
        )
    config.epochs = config.epochs or 1.0
    train.check(config)
    dataset = datasets.of(config.data)
    initial_model = initial.load(config, len(dataset.class_names), dataset.image_shape[-1])
    model = {**initial_model.model, "num_classes": len(dataset.class_names)}
    _check_run(config, vit.create(**model), datasets)
    return model


def _check_kept(settings: Config, datasets: Datasets, base: dict[str, Any]) -> None:
    """Raise UserError unless uptraining can continue with the pretrained model."""
    kinds = [
        f"{len(found.class_names)} classes of images with {found.image_shape[-1]} channels"
        for found in (datasets.of(settings[name].data) for name in ("pretrain", "uptrain"))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"pretrain.data has {kinds[0]}, uptrain.data has {kinds[1]}; uptraining continues with"
            " the model of pretraining, so give it data of the same kind"
        )
    # Conversion and uptraining leave these as they are, besides the architecture.
    kept = ("name", "image_size", "scan_layers", "param_dtype")
    kept = (*kept, *options.names(vit.known_options(), options.ARCHITECTURE))
    models = settings.pretrain.model, settings.uptrain.model
    different = [name for name in kept if models[0][name] != models[1][name]]
    if different:
        raise UserError(
            f"pretrain.model and uptrain.model differ in {', '.join(different)}; uptraining"
            " continues with the pretrained model, so set them alike"
        )
    for section in ("uptrain", "finetune"):
        if settings[section].init:
            raise UserError(
                f"{section}.init={settings[section].init!r}: a study begins with the model in"
                " pretrain.init; give it there"
            )


def _check_section(
    settings: Config, section: str, cell: Cell, base: dict[str, Any], datasets: Datasets
) -> None:
    """Raise UserError for a section after pretraining that cannot be run for a cell."""
    stage = next(stage for stage in STAGES if SECTIONS[stage] == section)
    found = grid.Stage(stage, stage, "", cell)
    config = stages_lib.config_of(settings, found)
    lengths = []
    if section == "uptrain":
        lengths = grid.lengths(settings, datasets.sizes(config.data)[0])
    config.epochs = config.epochs or 1.0  # 0 leaves it out; the data of uptraining are used even so
    train.check(config)
    model = stages_lib.model_options(config, base)
    if section == "finetune":
        defaults = config_lib.train_config().model
        dataset = datasets.of(config.data)
        model["num_classes"] = len(dataset.class_names)
        there, here = (d.image_shape[-1] for d in (datasets.of(settings.uptrain.data), dataset))
        if there not in (here, 3):
            raise UserError(
                f"{dataset.name} has images with {here} channels, those of uptraining have {there};"
                f" a patch embedding for {there} cannot be fitted to {here}, only one for 3 can"
            )
        if config.model.image_size != defaults.image_size:
            model["image_size"] = config.model.image_size
    model = vit.create(**model)
    for epochs in (config.epochs, *(epochs for _, epochs in lengths)):
        config.epochs = epochs
        _check_run(config, model, datasets)


def _check_run(config: Config, model: vit.VisionTransformer, datasets: Datasets) -> None:
    dataset, data = datasets.of(config.data), config.data
    channels = dataset.image_shape[-1]
    train.count_steps(config, datasets.sizes(data)[0])
    prepared = pipeline.prepare(dataset, model.image_shape, data)
    train.check_batches(config, prepared.image_shape)
    if data.on_device:
        pipeline.check_on_device(prepared.train)
    if config.optim.freeze:
        shapes = jax.eval_shape(lambda: vit.init_variables(model, jax.random.key(0), channels))
        optim.trainable(config.optim, shapes["params"])
