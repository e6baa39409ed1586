"""Memory of the host: what there is, and what its C library does with it where that is glibc."""

import contextlib
import ctypes
import math
import os
import pathlib
import sys
from collections.abc import Sequence

from kdgqa_jax.errors import UserError

_M_ARENA_MAX = -8  # of malloc.h


def check_batch(name: str, images: int, shape: Sequence[int]) -> None:
    """Raise UserError for a batch that this machine cannot hold even as bytes.

    Args:
      name: what the error calls the number of images.
      images: in the part of the batch that is this machine's.
      shape: of an image.
    """
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return
    needed = images * math.prod(shape)
    if needed > there:
        raise UserError(
            f"{name}={images} images of {'x'.join(map(str, shape))} take {needed / 2**30:.0f} GiB,"
            f" more than the {there / 2**30:.0f} GiB of this machine; take a smaller batch"
        )


def share_arenas() -> None:
    """Let threads share as many heaps as there are cores, unless the environment says how many.

    Otherwise they have up to eight per core, and what is free in one is of no use to the others: a
    long run's resident memory creeps up. To be called before threads start.
    """
    asked = "MALLOC_ARENA_MAX" in os.environ
    if not asked and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, len(os.sched_getaffinity(0)))


_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def request_huge_pages() -> None:
    """Run this process again with huge pages for large arrays, where Linux has them on request.

    A step on CPUs gets its temporary memory from the system each time. In pages of 4 KiB that takes
    an eighth of a training step (docs/speed.md). glibc reads the setting when a process starts. To
    be called first, by what is a process of its own. Where the environment has GLIBC_TUNABLES,
    nothing happens.
    """
    try:
        on_request = "[madvise]" in _HUGE_PAGES.read_text()
        release = os.confstr("CS_GNU_LIBC_VERSION").removeprefix("glibc ").split(".")
        knows = tuple(map(int, release)) >= (2, 35)
    except (OSError, ValueError, AttributeError):  # another system, or another C library
        return
    if on_request and knows and "GLIBC_TUNABLES" not in os.environ:
        sys.stdout.flush()
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def trim_heap() -> None:
    """Return memory that is free, but kept by the allocator, to the system.

    Compiling alone leaves hundreds of MiB of it, in which what comes after spreads out.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
