"""What Orbax's threads log of failures that are reported stays away; all else is logged."""

import logging
import sys
import types

import pytest

from kdgqa_jax import orbax_logs


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name in orbax_logs.LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    orbax_logs.silence.__wrapped__()
    return caplog


def fails(file):
    """An error that was raised in `file`."""
    try:
        exec(compile("raise ValueError('no space')", file, "exec"))
    except ValueError as error:
        return error


@pytest.mark.parametrize("logger", orbax_logs.LOGGERS)
def test_errors_of_orbax_alone_are_dropped(log, logger):
    ours, theirs = fails("/x/ours.py"), fails("/site-packages/orbax/checkpoint/future.py")
    logger = logging.getLogger(logger)
    logger.error("Task exception was never retrieved", exc_info=theirs)
    logger.error("Task was destroyed: <coro running at /site-packages/orbax/checkpoint/io.py:3>")
    assert not log.records
    logger.error("Task exception was never retrieved", exc_info=ours)
    logger.error("another")
    logger.warning("/orbax/checkpoint/ warns")
    logger.error("gs://bucket/orbax/run is another place: %d", 3)
    assert len(log.records) == 4


def test_what_is_raised_where_nobody_catches_it(log, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    orbax_logs.silence.__wrapped__()
    errors = [
        fails("/x/ours.py"),
        fails("/site-packages/orbax/checkpoint/io.py"),
        RuntimeError("Event loop is closed"),
        None,
    ]
    for error in errors:
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert [unraisable.exc_value for unraisable in seen] == [errors[0], None]
