"""Memory of the host: what there is, and what its C library does with it where that is glibc."""

import contextlib
import ctypes
import math
import os
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
    except (AttributeError, ValueError, OSError):  # a system that does not tell
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


def give_back() -> None:
    """Return memory that is free, but kept by the allocator, to the system.

    Compiling alone leaves hundreds of MiB of it, in which what comes after spreads out.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
