"""Values of flags: each a `type` of argparse that says what was expected."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from kdgqa_jax import paths
from kdgqa_jax.errors import LARGEST, SEEDS, UserError, one_line


def _value(expected: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A `type` of argparse that says what was expected where `parse` fails."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, OverflowError):
            shown = repr(one_line(text, 80))
            raise argparse.ArgumentTypeError(f"{shown} must be {expected}") from None

    return parsed


def _in(allowed: range, text: str) -> int:
    if int(text) not in allowed:
        raise ValueError
    return int(text)


def at_least(least: int) -> Callable[[str], int]:
    """A `type` for whole numbers from `least` on."""
    allowed = range(least, LARGEST + 1)
    return _value(f"a whole number, at least {least}", lambda text: _in(allowed, text))


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def _scales(text: str) -> list[float]:
    found = [_finite(x) for x in text.split(",")]
    if not all(0 <= x <= LARGEST for x in found):
        raise ValueError
    return found


def _image_size(text: str) -> int | tuple[int, int]:
    sides = [_in(range(1, LARGEST + 1), side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _place(text: str) -> str:
    paths.place(text)
    return text


POSITIVE, COUNT = at_least(1), at_least(0)
SEED = _value("a seed, 0 to 2**32 - 1", lambda text: _in(SEEDS, text))
NUMBER = _value("a finite number", _finite)
SCALES = _value("numbers from 0 on with commas", _scales)
NUMBERS = _value("finite numbers with commas", lambda text: [_finite(x) for x in text.split(",")])
IMAGE_SIZE = _value("SIDE or HEIGHTxWIDTH in pixels", _image_size)
PATH = _value("a path", _place)
PATH_OR_NONE = _value("a path", lambda text: text and _place(text))
SOURCE = _value("a path", lambda text: text if text.startswith("hf:") else _place(text))
