"""Paths: of the local file system, and of object storage (gs://, s3://). Nothing else has schemes.

A path of object storage is an `epath.Path`, which has the methods of `pathlib.Path`. A folder there
is no more than what the names of objects begin with.
"""

import dataclasses
import importlib
import logging
import os
import pathlib
import re
from typing import Any

from kdgqa_jax import extras
from kdgqa_jax.errors import UserError, one_line

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib makes gs:/x of gs://x


@dataclasses.dataclass(frozen=True)
class Store:
    """A row of `STORES`.

    Attributes:
      package: which reads and writes it, by fsspec.
      orbax: Orbax writes checkpoints there itself.
    """

    package: str
    orbax: bool


STORES: dict[str, Store] = {"gs": Store("gcsfs", orbax=True), "s3": Store("s3fs", orbax=False)}
"""Object storage by its scheme."""

Path = Any
"""`pathlib.Path`, or the `epath.Path` of object storage."""


def local(path: str | os.PathLike, what: str = "path") -> pathlib.Path:
    """The path, which has to be one of the local file system.

    Args:
      path: as somebody gave it.
      what: what an error calls it.

    Raises:
      UserError: it is empty, or has a scheme (gs://, s3://, file://).
    """
    text = _text(path, what)
    if _SCHEME.match(text):
        raise UserError(
            f"{what} {text!r} is not on the local file system, which is all that is read and"
            " written here; mount that storage or copy it (a folder of such a name is ./NAME)"
        )
    return pathlib.Path(text)


def place(path: str | os.PathLike, what: str = "path") -> Path:
    """The path, local or of object storage.

    Raises UserError: it is empty, has another scheme, names no bucket, or needs a package.
    """
    text = _text(path, what)
    scheme = _SCHEME.match(text)
    if not scheme:
        return pathlib.Path(text)
    if scheme[1] not in STORES or not re.match(r"\w+://[^/]", text):
        raise UserError(
            f"{what} {text!r} is neither on the local file system nor on object storage"
            " (gs://BUCKET/NAME, s3://BUCKET/NAME); mount that storage or copy it (a folder of such"
            " a name is ./NAME)"
        )
    package = STORES[scheme[1]].package
    extras.needs(package, f"{what} {text!r}")
    try:
        importlib.import_module(package)
        import fsspec
        from etils import epath
    except ImportError as error:
        raise UserError(
            f"{what} {text!r}: {package} cannot be imported ({one_line(error)}); install"
            ' "kdgqa-jax[cloud]"'
        ) from None
    # It logs each failure with a traceback; ours is one sentence.
    logging.getLogger(package).setLevel(logging.CRITICAL)
    # Other processes write too: what was listed a moment ago is no longer what is there.
    fsspec.config.conf.setdefault(scheme[1], {}).setdefault("use_listings_cache", False)
    return epath.Path(text.rstrip("/"))


def _text(path: str | os.PathLike, what: str) -> str:
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{what} {text!r} names no file or directory; give a path")
    return text


def is_remote(path: str | os.PathLike) -> bool:
    """It is on object storage."""
    return _store(path) is not None


def orbax_writes(path: str | os.PathLike) -> bool:
    """Orbax writes checkpoints there itself."""
    store = _store(path)
    return store is None or store.orbax


def _store(path: str | os.PathLike) -> Store | None:
    scheme, found, _ = os.fspath(path).partition("://")
    return STORES.get(scheme) if found else None


def absolute(path: str | os.PathLike, what: str = "path") -> Path:
    """As `place`, and from the root if it is local."""
    found = place(path, what)
    return found if is_remote(found) else found.absolute()


def taken(path: Path) -> bool:
    """Something is there, be it a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def failures(path: Path) -> type[Exception]:
    """What reading or writing there may raise: clients of object storage raise anything."""
    return Exception if is_remote(path) else OSError


def reason(error: Exception) -> str:
    """Why reading or writing failed, on one line."""
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__
