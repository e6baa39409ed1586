"""Memory of the host, where the C library is glibc."""

import contextlib
import ctypes
import os

_M_ARENA_MAX = -8  # of malloc.h


def share_arenas() -> None:
    """Let threads share as many heaps as there are cores, unless the environment says how many.

    Otherwise they have up to eight per core, and what is free in one is of no use to the others: a
    long run's resident memory creeps up. To be called before threads start.
    """
    asked = "MALLOC_ARENA_MAX" in os.environ
    if not asked and "arena_max" not in os.environ.get("GLIBC_TUNABLES", ""):
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, len(os.sched_getaffinity(0)))


def give_back() -> None:
    """Return memory that is free, but kept by the allocator, to the system.

    Compiling alone leaves hundreds of MiB of it, in which what comes after spreads out.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
