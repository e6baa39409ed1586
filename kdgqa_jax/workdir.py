"""Files of a run: holding a directory, and writing files so that they are whole or not there."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from kdgqa_jax import paths
from kdgqa_jax.errors import UserError, one_line


@contextlib.contextmanager
def written_file(path: pathlib.Path):
    """A file to write that appears at `path` only once the block has ended without an error."""
    partial = path.with_name(f".{path.name}.partial")
    with _told_in_a_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _open_to_others(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _open_to_others(file: pathlib.Path) -> None:
    """The permissions of an ordinary new file; some libraries write for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


@contextlib.contextmanager
def _told_in_a_sentence(path: pathlib.Path):
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}); choose another place") from None


def check_new(path: str | os.PathLike) -> pathlib.Path:
    """The absolute path. Raises UserError if something is there, which would be lost."""
    absolute = paths.local(path).absolute()
    if os.path.lexists(absolute):
        raise UserError(f"{absolute} exists already; delete it, or choose another place")
    return absolute


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON; a kill leaves no half-written file."""
    with written_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """The value in a JSON file. Raises UserError if it is not there or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(
            f"{path} is damaged ({reason}); delete it or choose another place"
        ) from None


def _filled(there: Any, defaults: Any) -> Any:
    """What is there, with the defaults of fields that it lacks."""
    if not isinstance(there, dict) or not isinstance(defaults, dict):
        return there
    lacking = {key: value for key, value in defaults.items() if key not in there}
    return lacking | {key: _filled(value, defaults.get(key)) for key, value in there.items()}


def _differences(there: Any, here: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value there, value here) of every field that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            difference
            for key in sorted(there.keys() | here.keys())
            for difference in _differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if there == here else [(name, there, here)]


LOCK = ".lock"
"""A file in every workdir: whoever runs there locks it and writes who it is."""


@contextlib.contextmanager
def held(
    workdir: str | os.PathLike,
    config: dict[str, Any],
    may_change: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> Iterator[pathlib.Path]:
    """Hold the directory of the run that `config` describes, for as long as the block lasts.

    Nobody else can hold it meanwhile. The end of the process releases it, however it comes; where
    the file system cannot lock files, nothing is held.

    Args:
      workdir: the directory; it is made if it is not there.
      config: nested dict of JSON values.
      may_change: dotted names of fields, or of sections, that may differ from those of before.
      defaults: of all fields; a run that began before a field existed had its default.

    Yields:
      The absolute path; it holds `config.json`.

    Raises:
      UserError: the directory cannot be made or written, holds the run of another config, or
        another process holds it.
    """
    path = paths.local(workdir, "workdir").absolute()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):  # what is wrong with the place, claim says
            path.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((path / LOCK).open("a+")), path)
        yield claim(path, config, may_change, defaults)


def _lock(file: TextIO, path: pathlib.Path) -> None:
    """Lock the file. Raises UserError if another process has, OSError or ImportError."""
    import fcntl  # which not every system has

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = one_line(file.read()) or "another process"
        raise UserError(
            f"workdir {path} is in use by {holder}; wait for its end or stop it, or choose another"
            " --workdir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def claim(
    workdir: str | os.PathLike,
    config: dict[str, Any],
    may_change: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Make `workdir` the directory of the run that `config` describes, or resume that run.

    Arguments, result and errors are those of `held`. The record of the config becomes the new one.
    """
    path = paths.local(workdir, "workdir").absolute()
    config, defaults = json.loads(json.dumps([config, defaults or {}]))  # as they are read back
    record = path / "config.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_json(record, config)
        elif not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"workdir {path} cannot be written ({reason}); choose another --workdir"
        ) from None
    differences = _differences(_filled(read_json(record), defaults), config)
    refused = [
        f"{name}: {there!r} there, {here!r} here"
        for name, there, here in differences
        if not any(f"{name}.".startswith(f"{free}.") for free in may_change)
    ]
    if refused:
        shown = "; ".join(refused[:4]) + ("; ..." if len(refused) > 4 else "")
        raise UserError(
            f"workdir {path} holds a run of another config ({shown}); choose another --workdir,"
            " or delete that one"
        )
    if differences:
        write_json(record, config)
    return path


@contextlib.contextmanager
def written_whole(path: pathlib.Path):
    """A directory that appears at `path` only once the block has ended without an error.

    Until then it is `.NAME.partial` beside it; what a kill has left there is replaced.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _told_in_a_sentence(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                if file.is_file():
                    _open_to_others(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
