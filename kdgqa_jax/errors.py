"""Bad input, reported in one sentence: what was wrong, where, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints its text alone, no traceback."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a table, with the nearest valid one."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(known)}")


def check_rate(name: str, rate: float) -> None:
    """Raise UserError for a rate (of dropout, say) outside of [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise UserError(f"{name}={rate} must be at least 0 and below 1")


def check_positive(name: str, value: int) -> None:
    """Raise UserError for a model option below 1."""
    if value < 1:
        raise UserError(f"model option {name}={value} must be at least 1")


def check_not_negative(name: str, value: float) -> None:
    """Raise UserError for a number below 0, which leaves something out."""
    if not value >= 0:
        raise UserError(f"{name}={value} must not be negative; 0: none")


SEEDS = range(2**32)
"""What random number generators take."""

LARGEST = 2**31 - 1
"""The largest number of anything: what comes near it is a slip, and overflows somewhere."""


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that is not in `SEEDS`."""
    if seed not in SEEDS:
        raise UserError(f"seed={seed} must be at least 0 and below 2**32")


class Preempted(Exception):
    """The run was asked to end, has saved its state and can resume later."""


def one_line(text: object, length: int | None = 200) -> str:
    """At most `length` characters of a text, on one line: the messages of others, in ours."""
    return " ".join(str(text).split())[:length]


_ESCAPES = {
    i: chr(i).encode("unicode_escape").decode()
    for i in (*range(32), *range(127, 160), 0x2028, 0x2029)  # ends of lines, too
}


def printable(text: object) -> str:
    """A text on one line: names of files hold anything, also what would control a terminal."""
    return str(text).translate(_ESCAPES)


def some(names: Iterable[object], count: int = 12) -> str:
    """The first `count` names of a file, each on one line, and how many more there are."""
    names = list(names)
    shown = ", ".join(printable(one_line(name)) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count:,} more"
