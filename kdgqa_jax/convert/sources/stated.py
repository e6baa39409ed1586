"""What lies beside weights says of the architecture, checked by its kind."""

import dataclasses
import math
from typing import Any

from kdgqa_jax import options, vit
from kdgqa_jax.errors import LARGEST, UserError, one_line

Values = dict[str, tuple[str, Any]]
"""By our name (an option of `vit.create`, or "channels"): (their name, value)."""


@dataclasses.dataclass
class Stated:
    """What a source says of itself.

    Attributes:
      place: what errors call the place where it says so.
      values: only what is stated is there.
      heads_of: the width of the model to which a stated number of heads belongs; None: to any.
      complete: it says which computation it is: what it does not state is as `vit.create` has it.
    """

    place: str
    values: Values
    heads_of: int | None = None
    complete: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """A value by our name."""
        return self.values[name][1] if name in self.values else default

    def check(self, found: dict[str, Any], file: str) -> None:
        """Raise UserError where `found` in a file, by our names, is something else."""
        wrong = [
            f"{theirs}={value!r} there, {found[name]!r} in the weights"
            for name, (theirs, value) in self.values.items()
            if found.get(name, value) != value
        ]
        if wrong:
            raise UserError(
                f"{self.place} does not fit {file}: {'; '.join(wrong)}; fetch both again"
            )


def checked(place: str, values: Values, **more: Any) -> Stated:
    """`Stated` of values in our form. Raises UserError for one of another kind than it has to be.

    Args:
      place: what errors call it.
      values: as a JSON file has them.
      **more: fields of `Stated`.
    """
    values = {
        name: (theirs, _checked(name, theirs, value, place))
        for name, (theirs, value) in values.items()
    }
    return Stated(place, values, **more)


def of_metadata(metadata: dict[str, Any], path: Any) -> Stated:
    """What the header of a file that we exported says. Raises UserError: of another kind."""
    place = f"{path}: metadata"
    kinds = {"model": dict, "class_names": list, "norm_stats": dict, "allocation": dict}
    for name, kind in kinds.items():
        if name in metadata and not isinstance(metadata[name], kind):
            raise UserError(
                f"{place}: {name}={one_line(repr(metadata[name]), 60)} is no"
                f" {'JSON object' if kind is dict else 'list'}; export the model again"
            )
    model, known = metadata.get("model", {}), vit.known_options()
    sizes = ("num_heads", "image_size", "head_width", "v_head_width")
    names = (*sizes, *options.names(known, options.ARCHITECTURE))
    stated = {name: (name, model[name]) for name in names if model.get(name) is not None}
    return checked(place, stated, complete=True)


def _checked(name: str, theirs: str, value: Any, place: str) -> Any:
    """The value in our form. Raises UserError if it is of another kind than it has to be."""
    refusal = f"{place}: {theirs}={one_line(repr(value), 60)} must be "
    if name in ("image_size", "patch_size"):
        return _sides(name, value, refusal)
    field = vit.known_options().get(name)
    kind = int if field is None else options.kind(field)
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(refusal + "true or false")
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        largest = 1 if name == "norm_epsilon" else LARGEST
        if not number or not 0 <= value < largest or not math.isfinite(value):
            raise UserError(refusal + f"a number from 0 to {largest}")
        return float(value)
    elif kind is str:
        choices = field.metadata["choices"]
        if not isinstance(value, str) or (choices is not None and value not in choices):
            raise UserError(refusal + f"one of {', '.join(map(str, choices or ()))}")
    elif not _is_whole(value) or value < 0:
        raise UserError(refusal + "a whole number")
    return value


def _sides(name: str, value: Any, refusal: str) -> Any:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(_is_whole(side) and side > 0 for side in sides):
        raise UserError(refusal + "a side in pixels, or [height, width]")
    if name == "image_size":
        return tuple(sides)
    return sides[0] if sides[0] == sides[1] else tuple(sides)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value <= LARGEST
