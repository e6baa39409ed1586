"""Tracebacks of Orbax's background threads, which come late and at length.

What fails there reaches the caller as well, who reports it in one sentence. Threads and tasks that
fail after that, or are collected, write tracebacks at any time until the process ends.
"""

import functools
import logging
import sys
import traceback
from typing import Any

LOGGERS = ("absl", "asyncio")
_FILES = "/orbax/checkpoint/"


@functools.cache
def silence() -> None:
    """Drop them for the rest of the process; what others log with these loggers stays.

    "Event loop is closed" is dropped whoever says it.
    """
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_stays)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _stays(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return True
    trace = traceback.format_exception(record.exc_info[1]) if record.exc_info else []
    return not any(_FILES in text for text in (record.pathname, str(record.msg), *trace))


def _unraisable(before: Any, unraisable: Any) -> None:
    error = unraisable.exc_value
    trace = "".join(traceback.format_exception(error)) if error else ""
    if _FILES not in trace and str(error) != "Event loop is closed":
        before(unraisable)
