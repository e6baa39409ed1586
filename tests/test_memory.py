"""Memory of the host."""

import os
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, sys, threading
from kdgqa_jax import memory
memory.share_arenas()
ready = threading.Barrier(16)
def work():
    ready.wait()
    kept.append(bytearray(100_000))
    ready.wait()
kept = []
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize("asked, expected", [(None, os.cpu_count()), ("3", 3)])
def test_threads_share_heaps(asked, expected):
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    if asked:
        environment["MALLOC_ARENA_MAX"] = asked
    run = subprocess.run(
        [sys.executable, "-c", HEAPS], env=environment, capture_output=True, text=True, check=True
    )
    assert 1 <= run.stdout.count("<heap nr=") <= expected
