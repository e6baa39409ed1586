"""Paths of the local file system. What looks like another storage is refused, not made a folder."""

import os
import pathlib
import re

from kdgqa_jax.errors import UserError

_ELSEWHERE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes gs:/x of gs://x


def local(path: str | os.PathLike, what: str = "path") -> pathlib.Path:
    """The path, which has to be one of the local file system.

    Args:
      path: as somebody gave it.
      what: what an error calls it.

    Raises:
      UserError: it is empty, or has a scheme (gs://, s3://, file://).
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{what} {text!r} names no file or directory; give a path")
    if _ELSEWHERE.match(text):
        raise UserError(
            f"{what} {text!r} is not on the local file system, which is all that is read and"
            " written; mount that storage or copy it (a folder of such a name is ./NAME)"
        )
    return pathlib.Path(text)
