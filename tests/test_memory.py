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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_process_runs_again_with_huge_pages_and_keeps_its_arguments(tmp_path):
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    code = (
        "import os, pathlib, sys; from kdgqa_jax import memory;"
        f" memory._HUGE_PAGES = pathlib.Path({str(pages)!r}); memory.request_huge_pages();"
        " print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
    )
    glibc = tuple(map(int, os.confstr("CS_GNU_LIBC_VERSION").split()[-1].split("."))) >= (2, 35)
    asked = "glibc.malloc.hugetlb=1" if glibc else None
    for enabled, before, after in (
        ("always [madvise] never", None, asked),
        ("[always] madvise never", None, None),
        ("always [madvise] never", "glibc.malloc.check=0", "glibc.malloc.check=0"),
    ):
        pages.write_text(enabled)
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
        environment |= {"GLIBC_TUNABLES": before} if before else {}
        command = [sys.executable, "-c", code, "a b", "--c=☃"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            out = child.stdout.read()
        assert (child.returncode, out) == (0, f"{child.pid} {after} ['a b', '--c=☃']\n")
