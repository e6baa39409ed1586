"""Object storage: what lies there is read from a local copy, what goes there is uploaded whole.

An object appears whole or not at all, so no rename is needed; of several objects that belong
together the one that says so is uploaded last.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from kdgqa_jax import paths
from kdgqa_jax.errors import UserError

CACHE = "KDGQA_CACHE"
"""The environment variable that says where local copies are kept."""


def fetched(path: str | os.PathLike, what: str = "path", needed: bool = True) -> pathlib.Path:
    """The path of a file or folder to read; of object storage, that of a local copy.

    Only objects that are new or have changed are copied. Local paths come back as they are.

    Args:
      path: local, or of object storage.
      what: what an error calls it.
      needed: something has to be there; otherwise the copy is one of nothing.

    Raises UserError: no path, nothing there, or it cannot be read.
    """
    there = paths.place(path, what)
    if not paths.is_remote(there):
        return there
    copy = cached(there)
    versions = copy.with_name(f".{copy.name}.versions")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with _locked(copy.with_name(f".{copy.name}.lock")):
            found = _copy(str(there), copy, versions)
    except paths.failures(there) as error:
        raise UserError(f"{what} {there} cannot be read ({paths.reason(error)})") from None
    if needed and not found:
        raise UserError(f"{what} {there} not found")
    return copy


def cached(path: paths.Path) -> pathlib.Path:
    """Where the local copy of a path of object storage is, or will be."""
    home = os.environ.get(CACHE) or pathlib.Path.home() / ".cache" / "kdgqa_jax"
    return pathlib.Path(home, *str(path).split("://"))


def _copy(url: str, copy: pathlib.Path, versions: pathlib.Path) -> bool:
    """Make a local copy what object storage holds; if it holds anything."""
    store, root = _store(url)
    there = {
        name.removeprefix(root).strip("/"): _version(about)
        for name, about in store.find(root, detail=True).items()
        if not name.endswith("/")
    }
    before = json.loads(versions.read_text()) if versions.exists() else {}
    lacking = [n for n, v in there.items() if before.get(n) != v or not (copy / n).exists()]
    for name in before.keys() - there.keys():
        (copy / name).unlink(missing_ok=True)
    partial = {name: (copy / name).with_name(f".{(copy / name).name}.partial") for name in lacking}
    for file in partial.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    if lacking:
        objects = [f"{root}/{name}" if name else root for name in lacking]
        store.get(objects, [os.fspath(file) for file in partial.values()])
    for name, file in partial.items():
        os.replace(file, copy / name)
    versions.write_text(json.dumps(there))
    return bool(there)


def _version(about: dict[str, Any]) -> str:
    """What changes with the content of an object."""
    marks = ("size", "generation", "etag", "ETag", "md5Hash")
    return " ".join(str(about.get(mark, "")) for mark in marks)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One process of this machine at a time, where there are locks."""
    with path.open("a") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _store(url: str) -> tuple[Any, str]:
    """(file system of fsspec, path without scheme)."""
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def upload(files: dict[pathlib.Path, paths.Path]) -> None:
    """Upload files, each to its place; those last that say what the others are.

    Raises whatever the client of the storage raises: see `paths.failures`.
    """
    for last in (False, True):
        now = {f: p for f, p in files.items() if _says_whole(f.name) == last}
        if now:
            store, _ = _store(str(next(iter(now.values()))))
            store.put([os.fspath(file) for file in now], [str(place) for place in now.values()])


def replace_folder(folder: pathlib.Path, place: paths.Path) -> None:
    """Make a folder of object storage the same as a local one; it does not count meanwhile."""
    files = {file: place / file.relative_to(folder).as_posix() for file in folder.rglob("*")}
    files = {file: there for file, there in files.items() if file.is_file()}
    there = list(place.iterdir()) if place.exists() else []
    for path in sorted(there, key=lambda path: _says_whole(path.name), reverse=True):
        remove(path) if path.is_dir() else path.unlink()
    upload(files)


COMPLETE = "commit_success.txt"
"""An object that says that a checkpoint is complete; Orbax has it, too."""


def _says_whole(name: str) -> bool:
    """Without this file, those beside it do not count."""
    return name.endswith((COMPLETE, ".json"))


def remove(path: paths.Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if not paths.is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        _store(str(path))[0].rm(str(path), recursive=True)


def move(path: paths.Path, to: paths.Path) -> None:
    """Move a folder; what is at the new place goes."""
    remove(to)
    if not paths.is_remote(path):
        os.replace(path, to)
        return
    store, root = _store(str(path))
    for name in store.find(root):  # one by one: for s3fs, folders are objects that are not there
        store.cp_file(name, f"{to}{name.removeprefix(root)}")
    remove(path)


class Mirror:
    """A local folder for what has to append to files or to rename them, copied to object storage.

    Args:
      place: of object storage.
      names: of files and folders there with which it begins.

    Attributes:
      local: the folder.
    """

    def __init__(self, place: paths.Path, names: Iterable[str] = ()):
        self.place = place
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="kdgqa-"))
        self._sent: dict[str, tuple[int, int]] = {}
        store, root = _store(str(place))
        for name in names:
            if (place / name).exists():
                store.get(f"{root}/{name}", os.fspath(self.local / name), recursive=True)
        self._sent = self._files()

    def push(self) -> None:
        """Upload the files that have changed, and remove those that are gone."""
        now = self._files()
        changed = [name for name, state in now.items() if self._sent.get(name) != state]
        upload({self.local / name: self.place / name for name in changed})
        gone = self._sent.keys() - now.keys()
        for name in sorted(gone, key=_says_whole, reverse=True):
            (self.place / name).unlink(missing_ok=True)
        self._sent = now

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change by name."""
        found = {}
        for path in sorted(self.local.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                about = path.stat()
                found[path.relative_to(self.local).as_posix()] = (about.st_size, about.st_mtime_ns)
        return found

    def close(self) -> None:
        """Forget the local folder."""
        shutil.rmtree(self.local, ignore_errors=True)
