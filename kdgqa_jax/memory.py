"""Memory of the host."""

import contextlib
import ctypes


def give_back() -> None:
    """Return memory that is free, but kept by the allocator, to the system (on glibc).

    Compiling alone leaves hundreds of MiB of it, in which what comes after spreads out.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
