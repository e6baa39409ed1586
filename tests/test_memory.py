"""Memory of the host."""

import os
import platform
import subprocess
import sys

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
HEAPS = """
import ctypes, sys, threading
from kdgqa_jax import memory
memory.share_arenas()
ready = threading.Barrier(COUNT)
def work():
    ready.wait()
    kept.append(bytearray(100_000))
    ready.wait()
kept = []
threads = [threading.Thread(target=work) for _ in range(COUNT)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heaps")
@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, CORES),
        ({"MALLOC_ARENA_MAX": "3"}, 3),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, 1),
    ],
)
def test_threads_share_heaps(asked, expected):
    names = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {k: v for k, v in os.environ.items() if k not in names} | asked
    script = HEAPS.replace("COUNT", str(8 * expected))
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.count("<heap nr=") == expected
