"""Settings and fixtures shared by the tests.

JAX reads its settings from the environment when it is imported. So nothing here imports it before
`pytest_configure` has run: fixtures that need it import it themselves.
"""

import fcntl
import importlib.metadata
import os
import pathlib
import shutil
import socket
import sys
import tempfile

import pytest
from hypothesis import settings

# Machines that run tests differ in speed, and a test that draws new numbers each time cannot be
# distinguished from a flaky one.
settings.register_profile("kdgqa", deadline=None, derandomize=True)
settings.load_profile("kdgqa")


def pytest_configure(config):
    """Tests spend most of their time compiling: less of it, and one cache for all processes.

    The same programs come up again and again: in restarted runs, in workers, in subprocesses.
    What the environment sets already stays: JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles everything as
    users do.
    """
    assert "jax" not in sys.modules, "a plugin has imported jax: its settings would come too late"
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones lack the flag
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
    # Where an operation was traced matters to no test, and is a tenth of what tracing costs.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    # Processes that tests start need not run again for the sake of speed.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.compilation_cache = tempfile.mkdtemp(prefix="kdgqa_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compilation_cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure(config):
    shutil.rmtree(getattr(config, "compilation_cache", ""), ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no worker waits for the other's last one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip what needs float16 where XLA cannot compile that: for x86 without AVX."""
    try:
        return (yield)
    except Exception as error:
        if "Failed to materialize symbols" in str(error):
            import helpers

            if not helpers.compiles("float16"):
                pytest.skip("XLA compiles no float16 for this processor")
        raise


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Compiled programs take memory maps; Linux gives a process 65,530, and XLA crashes beyond."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def golden():
    """Load `tests/goldens/NAME.npz` as a dict of arrays."""
    import helpers

    return helpers.load_golden


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """`made_once(name, fill)`: a folder that `fill(folder)` fills, once for all workers."""

    def make(name, fill):
        place = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            place = place.parent
        with open(place / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = place / f"{name}.made"  # written last: a fill that failed is tried again
            if not made.exists():
                shutil.rmtree(place / name, ignore_errors=True)
                (place / name).mkdir()
                fill(place / name)
                made.touch()
        return place / name

    return make


@pytest.fixture(scope="session")
def config_file(made_once):
    """The config of runs in processes of their own, beside its data."""
    import run_helpers as runs

    return made_once("config", runs.write_config) / "run.py"


@pytest.fixture(scope="session")
def whole(made_once, config_file):
    """The workdir of its 30 steps in one go."""
    import run_helpers as runs

    return made_once("whole", lambda w: runs.finish(runs.start(config_file, w)))


@pytest.fixture
def poison(monkeypatch):
    """Batches whose first image is black give an input of NaN to training steps."""
    import jax.numpy as jnp

    from kdgqa_jax import train_step

    augmented = train_step.augment.training_batch

    def planted(images, *arguments):
        out, targets = augmented(images, *arguments)
        return jnp.where(jnp.all(images[0] == 0), jnp.nan, out), targets

    train_step.make_train_step.cache_clear()
    monkeypatch.setattr(train_step.augment, "training_batch", planted)
    yield
    train_step.make_train_step.cache_clear()


@pytest.fixture
def no_network(monkeypatch):
    """Whoever connects to anything fails the test, even if the error is caught."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert not tried
