"""What the terminal shows: a live progress bar, or plain lines where output is no terminal."""

import sys
import time
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

LINE_EVERY = 10.0  # seconds between plain lines
_silent = False


def be_silent() -> None:
    """From now on nothing is shown; for all processes of a job but the first."""
    global _silent
    _silent = True


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
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
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
        print(line, flush=True)


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", numbers: bool = False
) -> None:
    """A table on standard output; with `numbers`, all columns but the first are aligned right."""
    shown = Table(*header, title=title or None)
    for column in shown.columns[1:]:
        column.justify = "right" if numbers else "left"
    for row in rows:
        shown.add_row(*row)
    needed = Console(width=1000).measure(shown).maximum
    if sys.stdout.isatty():  # a narrow terminal wraps cells, as far as that can be read
        needed = max(Console().width, min(needed, 100))
    Console(width=needed, highlight=False).print(shown)
