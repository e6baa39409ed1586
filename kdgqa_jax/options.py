"""Options of models: fields that say what they are for, and the checks that all of them share."""

import dataclasses
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from kdgqa_jax.errors import UserError, unknown

SIZE = "size"
"""Follows from the name of a model, or from the data set."""

ARCHITECTURE = "architecture"
"""A model has it once and for all."""

CONVERSION = "conversion"
"""A model can be converted to another value."""

RULE = "rule"
"""Of a grouping rule or of noise: a run that starts from a model may set another value."""

RUN = "run"
"""How to train and compute, not what: a run takes it from its own config."""

PROGRAM = "program"
"""As `RUN`, and changes numbers by rounding only, and which random numbers a layer draws."""


def option(
    default: Any = dataclasses.MISSING,
    role: str = RULE,
    *,
    choices: Collection[Any] | None = None,
    check: Callable[[str, Any], None] | None = None,
) -> Any:
    """A dataclass field that says what it is for.

    Args:
      default: its value where none is given.
      role: one of those above.
      choices: the values that it takes; None: any.
      check: called with its name and value; raises UserError for a bad one.
    """
    metadata = {"role": role, "choices": choices, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


def fields(owner: Any) -> dict[str, dataclasses.Field]:
    """The options of a dataclass or an instance, by name: its fields that have a role."""
    return {f.name: f for f in dataclasses.fields(owner) if "role" in f.metadata}


def names(known: Mapping[str, dataclasses.Field], *roles: str) -> tuple[str, ...]:
    """The names of the options in these roles, in order."""
    return tuple(name for role in roles for name, f in known.items() if f.metadata["role"] == role)


_KINDS = {int: numbers.Integral, float: numbers.Real, str: str, bool: bool}


def kind(field: dataclasses.Field) -> type | None:
    """int, float, str or bool, if that is what a field takes, besides None perhaps."""
    return next((kind for kind in _KINDS if field.type in (kind, kind | None)), None)


def check_kinds(known: Mapping[str, dataclasses.Field], values: Mapping[str, Any]) -> None:
    """Raise UserError for a value that is no number, text or flag where its option is one."""
    for name, value in values.items():
        expected = kind(known[name]) if name in known else None
        if expected is None or (value is None and known[name].type != expected):
            continue
        fits = isinstance(value, _KINDS[expected])
        if not fits or (isinstance(value, bool) and expected is not bool):
            raise UserError(f"model option {name}={value!r} must be of type {expected.__name__}")


def check(owner: Any) -> None:
    """Raise UserError for an option of an instance that is of another kind, or out of bounds."""
    known = fields(owner)
    check_kinds(known, {name: getattr(owner, name) for name in known})
    for name, field in known.items():
        value, choices = getattr(owner, name), field.metadata["choices"]
        if choices is not None and value not in choices:
            raise unknown(name, value, map(str, choices))
        if field.metadata["check"] is not None:
            field.metadata["check"](name, value)


def chosen(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are options of a dataclass."""
    return {name: values[name] for name in fields(owner) if name in values}


def union(owners: Iterable[Any]) -> dict[str, dataclasses.Field]:
    """The options of several dataclasses by name.

    Raises ValueError if two of them have an option of one name with different types or defaults.
    """
    known: dict[str, dataclasses.Field] = {}
    for owner in owners:
        for name, field in fields(owner).items():
            same = known.setdefault(name, field)
            if (same.type, same.default) != (field.type, field.default):
                raise ValueError(
                    f"option {name!r} is {field.type} with default {field.default!r} in"
                    f" {owner.__name__}, but {same.type} with default {same.default!r} elsewhere"
                )
    return known
