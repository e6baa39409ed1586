"""What the terminal shows: a live progress bar, or plain lines where output is no terminal.

Names of files and classes are shown as they are: nothing in them is markup, and what standard
output cannot encode, or a terminal would obey, is shown as an escape.
"""

import io
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kdgqa_jax.errors import printable

LINE_EVERY = 10.0  # seconds between plain lines
_silent = False


def be_silent() -> None:
    """From now on nothing is shown; for all processes of a job but the first."""
    global _silent
    _silent = True


def prepare() -> None:
    """For the command line: output that no name breaks, and without a warning of large images.

    From now on a character that standard output or error cannot encode is shown as an escape.
    Pillow warns from half the size on that it refuses.
    """
    warnings.filterwarnings("ignore", "Image size .* decompression bomb", RuntimeWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # closed streams are None
            stream.reconfigure(errors="backslashreplace")


class ProgressBar:
    """Steps done, rate and time left: `with ProgressBar("uptrain", total) as bar: bar.update(n)`.

    Args:
      title: what is being done.
      total: the number of steps.
      done: steps that were done before.
    """

    def __init__(self, title: str, total: int, done: int = 0):
        self._title, self._total, self._done = title, total, done
        self._start = self._last_line = time.monotonic()
        self._first = done
        self._live = None
        if Console().is_terminal and not _silent:
            self._live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._task = self._live.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        if self._live:
            self._live.start()
        return self

    def update(self, done: int, note: str = "") -> None:
        """`done` steps are done in all; `note` is shown beside them."""
        self._done = done
        if self._live:
            self._live.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._last_line >= LINE_EVERY and not _silent:
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        left = (self._total - self._done) / rate if rate else float("inf")
        print(
            f"{self._title}: step {self._done}/{self._total}, {rate:.1f} steps/s,"
            f" {left:.0f} s left  {note}".rstrip(),
            flush=True,
        )

    def __exit__(self, *exception: Any) -> None:
        if self._live:
            self._live.stop()


def say(line: str) -> None:
    """One plain line on standard output."""
    if not _silent:
        print(printable(line), flush=True)


def _cell(text: str) -> Text:
    """A text as it is, in the characters that standard output has."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return Text(printable(text).encode(encoding, "backslashreplace").decode(encoding))


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", numbers: bool = False
) -> None:
    """A table on standard output; with `numbers`, all columns but the first are aligned right."""
    shown = Table(title=_cell(title) if title else None)
    for i, name in enumerate(header):
        justify = "right" if numbers and i else "left"
        shown.add_column(_cell(name), justify=justify, overflow="fold")
    for row in rows:
        shown.add_row(*map(_cell, row))
    needed = Console(width=1000).measure(shown).maximum
    if sys.stdout.isatty():  # a narrow terminal wraps cells, as far as that can be read
        needed = max(Console().width, min(needed, 100))
    Console(width=needed, highlight=False).print(shown)
