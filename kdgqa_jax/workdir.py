"""Files of a run: holding a directory, and writing files so that they are whole or not there."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from kdgqa_jax import paths, storage
from kdgqa_jax.errors import UserError, one_line


@contextlib.contextmanager
def written_file(path: paths.Path) -> Iterator[pathlib.Path]:
    """A local file to write that appears at `path` once the block has ended without an error."""
    with _failure_in_a_sentence(path):
        if paths.is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                partial = pathlib.Path(folder, path.name)
                yield partial
                with _failure_in_a_sentence(path, Exception):
                    storage.upload({partial: path})
            return
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _settle(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _settle(file: pathlib.Path) -> None:
    """Give a file the permissions of an ordinary new one, and wait until it is on the disk.

    Some libraries write for the owner alone. A machine that loses its power may otherwise have the
    new name and not the content.
    """
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    with file.open("rb") as content:
        os.fsync(content.fileno())


@contextlib.contextmanager
def _failure_in_a_sentence(path: paths.Path, kind: type[Exception] = OSError) -> Iterator[None]:
    """Raise UserError for a failure to write: clients of object storage raise any exception."""
    try:
        yield
    except UserError:
        raise
    except kind as error:
        raise UserError(
            f"{path} cannot be written ({paths.reason(error)}); choose another place"
        ) from None


def check_new(path: str | os.PathLike) -> paths.Path:
    """The absolute path. Raises UserError if something is there, which would be lost."""
    absolute = paths.absolute(path)
    with _failure_in_a_sentence(absolute, Exception):
        taken = paths.taken(absolute)
    if taken:
        raise UserError(f"{absolute} exists already; delete it, or choose another place")
    return absolute


def write_json(path: paths.Path, value: Any) -> None:
    """Write JSON; a kill leaves no half-written file."""
    with written_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: paths.Path) -> Any:
    """The value in a JSON file. Raises UserError if it is not there, cannot be read, or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise UserError(
            f"{path} is damaged ({reason}); delete it or choose another place"
        ) from None
    except paths.failures(path) as error:
        raise UserError(f"{path} cannot be read ({paths.reason(error)})") from None


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

_OWNED: dict[str, str] = {}
"""What this process has written into the lock of each workdir on object storage."""


@contextlib.contextmanager
def held(
    workdir: str | os.PathLike,
    config: dict[str, Any],
    may_change: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> Iterator[paths.Path]:
    """Hold the directory of the run that `config` describes, for as long as the block lasts.

    Nobody else can hold it meanwhile. The end of the process releases it, however it comes; where
    the file system cannot lock files, nothing is held. Object storage has no locks that the end of
    a process releases: there the newest run holds the workdir, and the one before ends at its next
    `check_held`.

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
    path = paths.absolute(workdir, "workdir")
    if paths.is_remote(path):
        claim(path, config, may_change, defaults)
        _OWNED[str(path)] = f"{_who()}, {uuid.uuid4().hex}"
        with _failure_in_a_sentence(path / LOCK, Exception):
            (path / LOCK).write_text(_OWNED[str(path)])
        try:
            yield path
        finally:
            del _OWNED[str(path)]
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):  # what is wrong with the place, claim says
            path.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((path / LOCK).open("a+")), path)
        yield claim(path, config, may_change, defaults)


def check_held(path: paths.Path) -> None:
    """Raise UserError if another run has begun in a workdir on object storage that this one holds.

    To be called before anything is written that must not replace what that one has written.
    """
    ours = _OWNED.get(str(path))
    if ours is None:
        return
    try:
        holder = (path / LOCK).read_text()
    except paths.failures(path) as error:
        raise UserError(f"{path / LOCK} cannot be read ({paths.reason(error)})") from None
    if holder != ours:
        raise UserError(
            f"workdir {path} is now that of {one_line(holder.partition(',')[0])}, which began after"
            " this run; this one ends, and that one resumes from the same checkpoints"
        )


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


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
    file.write(_who())
    file.flush()


def claim(
    workdir: str | os.PathLike,
    config: dict[str, Any],
    may_change: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> paths.Path:
    """Make `workdir` the directory of the run that `config` describes, or resume that run.

    Arguments, result and errors are those of `held`. The record of the config becomes the new one.
    """
    path = paths.absolute(workdir, "workdir")
    config, defaults = json.loads(json.dumps([config, defaults or {}]))  # as they are read back
    record = path / "config.json"
    try:
        if not paths.is_remote(path):
            path.mkdir(parents=True, exist_ok=True)
        if not record.exists():
            write_json(record, config)
        elif not paths.is_remote(path) and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except UserError:
        raise
    except paths.failures(path) as error:
        raise UserError(
            f"workdir {path} cannot be written ({paths.reason(error)}); choose another --workdir"
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
def written_whole(path: paths.Path) -> Iterator[pathlib.Path]:
    """A local directory that appears at `path` once the block has ended without an error.

    Until then it is `.NAME.partial` beside it; what a kill has left there is replaced. On object
    storage its JSON files, without which it does not count, go first and come last.
    """
    with _failure_in_a_sentence(path):
        if paths.is_remote(path):
            with tempfile.TemporaryDirectory() as folder:
                yield pathlib.Path(folder)
                with _failure_in_a_sentence(path, Exception):
                    storage.replace_folder(pathlib.Path(folder), path)
            return
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                if file.is_file():
                    _settle(file)
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
