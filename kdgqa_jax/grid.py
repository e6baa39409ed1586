"""The grid of a study: which cells it has, and which stages they share.

A *cell* is an entry (a variant and its rule of conversion) with settings of further axes, for one
seed. It goes through the stages of the protocol, each of which has a folder of its own. A setting
names a folder only from the stage on that it changes, so that cells share what comes before:

    seed42/pretrained/                              every cell of the seed
    seed42/gqa@svd,num_kv_heads=2/converted/        both lengths of uptraining
    seed42/gqa@svd,num_kv_heads=2,uptrain.epochs=1.0/uptrained/

An axis is text, "FIELD=VALUE|VALUE|...". `AXES` says what a field may be.
"""

import dataclasses
import itertools
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import ml_collections

from kdgqa_jax import config as config_lib
from kdgqa_jax import options, vit
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.entry import Entry, parse_entries
from kdgqa_jax.errors import UserError

Config: TypeAlias = ml_collections.ConfigDict

STAGES = ("pretrained", "converted", "uptrained", "finetuned")
"""Of the protocol, in order. Each begins with the model of the one before it."""

SECTIONS = dict(zip(STAGES, ("pretrain", "uptrain", "uptrain", "finetune"), strict=True))
"""The section of the config that a stage follows."""

_ALL = ("pretrain.", "uptrain.", "finetune.")


class Axis(NamedTuple):
    """What a field of an axis is.

    sections: what it is set in; "" is the study itself.
    changes: the first stage that it changes.
    """

    sections: tuple[str, ...]
    changes: str


AXES: dict[str, Axis] = {
    "num_kv_heads": Axis(("",), "converted"),
    "calibration_images": Axis(("",), "converted"),
    "pretrain.": Axis(("",), "pretrained"),
    "uptrain.model.": Axis(("",), "converted"),
    "uptrain.data.": Axis(("",), "converted"),
    "uptrain.data.label_noise": Axis(("",), "uptrained"),
    "uptrain.": Axis(("",), "uptrained"),
    "finetune.": Axis(("",), "finetuned"),
    "": Axis(_ALL, "pretrained"),  # such as model.name and data.name
}
"""By the longest key that a field begins with. Options of grouping rules and of conversion, as in
`model.window`, do not concern the pretrained model, which has no groups: see `axis_of`."""


def axis_of(field: str) -> Axis:
    """What a field of an axis is."""
    later = field.startswith("model.") and field != "model.image_size"
    if later and _has_role(field, options.RULE, options.CONVERSION):
        return Axis(_ALL[1:], "converted")
    return AXES[max((key for key in AXES if field.startswith(key)), key=len)]


def _has_role(field: str, *roles: str) -> bool:
    return field.rpartition(".")[2] in options.names(vit.known_options(), *roles)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Attributes:
      seed: of everything that is drawn.
      entry: the variant, and the rule of its conversion.
      settings: (field, value as text) of the axes that concern it, in the order of the axes.
    """

    seed: int
    entry: Entry
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """As records, tables and plots have it, for all seeds alike: "gqa (svd), K=2"."""
        last = [field.rpartition(".")[2] for field, _ in self.settings]
        names = {"num_kv_heads": "K"}
        shown = [
            names.get(short, short) if last.count(short) == 1 else field
            for (field, _), short in zip(self.settings, last, strict=True)
        ]
        pairs = zip(shown, self.settings, strict=True)
        return ", ".join([self.entry.name, *(f"{name}={text}" for name, (_, text) in pairs)])

    def until(self, stage: str) -> "Cell":
        """The cell with the settings alone that change what comes up to a stage."""
        reached = STAGES[: STAGES.index(stage) + 1]
        settings = tuple(s for s in self.settings if axis_of(s[0]).changes in reached)
        return dataclasses.replace(self, settings=settings)

    def applied(self, study: Config) -> Config:
        """The config of the study with the settings of the cell. Raises UserError: a bad one."""
        return config_lib.override(
            study,
            [
                f"--config.{section}{field}={text}"
                for field, text in self.settings
                for section in axis_of(field).sections
            ],
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is computed once, in a folder of its own, for all cells that need it.

    Attributes:
      name: as records have it: "converted", "uptrained 50"; of probes "probes of converted".
      kind: one of `STAGES`; of probes, that of what is probed.
      folder: relative to the study's.
      cell: with no other settings than those that change it.
      before: the folder of the stage that it begins with or probes; "": none.
      epochs: of training; None: those of its section.
      probes: names in `probes.PROBES`, which share the features; (): a stage of the protocol.
    """

    name: str
    kind: str
    folder: str
    cell: Cell
    before: str = ""
    epochs: float | None = None
    probes: tuple[str, ...] = ()


def cells(study: Config) -> list[Cell]:
    """The cells of a study, by seed and then in the order of variants and axes.

    Raises UserError: an axis that is none, unknown variants or rules, one of them twice.
    """
    axes = [_parse(text) for text in study.grid]
    fields = [field for field, _ in axes]
    twice = next((field for field in fields if fields.count(field) > 1), None)
    if twice:
        raise UserError(f"grid has the axis {twice} twice; give its values in one, A|B")
    rules = dict(axes).get("pooling", ())
    axes = [axis for axis in axes if axis[0] != "pooling"]
    parse_entries(study.variants, study.pooling)  # one of them twice, without the axis
    found: dict[tuple, Cell] = {}
    for seed in range(study.seed, study.seed + study.seeds):
        for text in study.variants:
            for entry, settings in itertools.product(
                _entries(text, study.pooling, rules), _products(axes)
            ):
                concerned = tuple(s for s in settings if _concerns(s[0], entry))
                key = (seed, entry.variant, entry.rule, concerned)
                found.setdefault(key, Cell(seed, entry, concerned))
    return list(found.values())


def _parse(text: str) -> tuple[str, list[str]]:
    field, equals, values = text.partition("=")
    given = values.split("|")
    if not (field and equals and all(given)) or len(set(given)) < len(given):
        raise UserError(f"grid: {text!r} must have the form FIELD=VALUE|VALUE, no value twice")
    return field, given


def _products(axes: Sequence[tuple[str, list[str]]]) -> Iterator[tuple[tuple[str, str], ...]]:
    return itertools.product(*([(field, value) for value in values] for field, values in axes))


def _entries(text: str, default_rule: str, rules: Sequence[str]) -> list[Entry]:
    """One entry, or one for every rule where there is an axis of rules that concerns it."""
    entry = Entry.parse(text, default_rule)
    if "@" in text or not rules or not entry.rule:
        return [entry]
    return [Entry.parse(f"{text}@{rule}", default_rule) for rule in rules]


def _concerns(field: str, entry: Entry) -> bool:
    """Whether an axis makes a difference to an entry."""
    variant = VARIANTS[entry.variant]
    if field == "num_kv_heads":
        return not variant.multi_head
    if field == "calibration_images":
        return entry.calibrated
    if ".model." in f".{field}" and not field.startswith("pretrain."):
        if _has_role(field, options.RULE):
            return field.rpartition(".")[2] in options.union(variant.parts)
        if _has_role(field, options.CONVERSION) and not field.endswith(".image_size"):
            return not variant.multi_head
    return True


# --- the stages of a cell -------------------------------------------------------------------------

LONGEST = 255
"""Of the name of a folder, in bytes, on common file systems."""


def _label(cell: Cell, first: str) -> str:
    quoted = (f"{field}={urllib.parse.quote(text, safe='+')}" for field, text in cell.settings)
    label = ",".join([first, *quoted])
    if len(label) > LONGEST:
        raise UserError(f"grid: {label!r} is too long for the name of a folder; use fewer axes")
    return label


def stages(config: Config, cell: Cell, images: int) -> list[Stage]:
    """The stages of a cell in order, probes included.

    Args:
      config: of the study, with the settings of the cell.
      cell: a cell of it.
      images: that uptraining trains on, of which steps make epochs.

    Raises:
      UserError: lengths of uptraining that are none.
    """
    base = dataclasses.replace(cell.until("pretrained"), entry=Entry("mha", "pretrained", "mha"))
    given = not config.pretrain.epochs  # the same for all seeds
    place = _label(base, "pretrained")
    found = [
        Stage("pretrained", "pretrained", place if given else f"seed{cell.seed}/{place}", base)
    ]

    def add(name: str, kind: str, before: Stage, epochs: float | None = None) -> Stage:
        own = cell.until(kind)
        label, file = _label(own, cell.entry.folder), name.replace(" ", "_")
        folder = f"seed{cell.seed}/{label}/{file}"
        found.append(Stage(name, kind, folder, own, before.folder, epochs))
        return found[-1]

    last = converted = add("converted", "converted", found[0])
    for name, epochs in lengths(config, images):
        last = add(name, "uptrained", converted, epochs)
    if config.finetune.epochs:
        add("finetuned", "finetuned", last)
    probed = [stage for stage in found if config.probes and stage.kind in config.probed]
    return [*found, *(_probes_of(stage, tuple(config.probes)) for stage in probed)]


def _probes_of(stage: Stage, probes: tuple[str, ...]) -> Stage:
    return dataclasses.replace(
        stage,
        name=f"probes of {stage.name}",
        folder=f"{stage.folder}_{'+'.join(probes)}",
        before=stage.folder,
        probes=probes,
    )


def lengths(config: Config, images: int) -> list[tuple[str, float]]:
    """(stage, epochs) of every length of uptraining, for a training split of so many images.

    Raises UserError: steps that are no numbers, or one of them twice.
    """
    if not config.uptrain_steps:
        return [("uptrained", config.uptrain.epochs)] if config.uptrain.epochs else []
    try:
        steps = [int(n) for n in config.uptrain_steps]
    except ValueError:
        steps = [0]
    if min(steps) < 1 or len(set(steps)) < len(steps):
        raise UserError(
            f"uptrain_steps={config.uptrain_steps} must be different numbers of steps, at least 1"
        )
    return [(f"uptrained {n}", n * config.uptrain.batch_size / images) for n in steps]
