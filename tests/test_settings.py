"""Settings of the tests hold wherever they run; what they compare numbers with."""

import os
import pathlib
import subprocess
import sys
import tomllib

import helpers
import jax
import numpy as np
import pytest

SETTINGS = ("jax_disable_most_optimizations", "jax_compilation_cache_dir")


def test_settings_hold_here_and_in_child_processes():
    here = [jax.config.values[name] for name in SETTINGS]
    assert here[0] == (os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    assert here[1] == os.environ["JAX_COMPILATION_CACHE_DIR"]
    shown = f"[jax.config.values[name] for name in {SETTINGS}], len(jax.devices())"
    child = subprocess.run(
        [sys.executable, "-c", f"import jax; print({shown})"],
        env=helpers.child_environment(devices=3),
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.strip() == f"{here} 3"


def test_children_keep_the_flags_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    flags = helpers.child_environment(devices=2)["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_max_isa=AVX2", "--xla_force_host_platform_device_count=2"]


def test_close_is_relative_to_the_largest_number():
    large = np.array([1e6, 1.0, 0.0])
    helpers.assert_close({"x": large + 5.0}, {"x": large}, 1e-5)
    for actual, expected, options in (
        (large + 20.0, large, {}),
        (large[2:] + 1e-9, large[2:], {}),  # zeros are zeros
        (large[:2], large, {}),
        (np.array([1, 2]), np.array([1, 3]), {"scale": 1e9}),  # integers
        ({"x": large}, {"y": large}, {}),
        (large * np.nan, large, {}),
    ):
        with pytest.raises(AssertionError):
            helpers.assert_close(actual, expected, 1e-5, **options)
    helpers.assert_close(large[2:] + 1e-9, large[2:], 1e-5, scale=1.0)


def test_every_package_is_installed():
    root = pathlib.Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {p.parent.relative_to(root) for p in root.glob("kdgqa_jax/**/__init__.py")}
    assert set(listed) == {".".join(p.parts) for p in there} | {"kdgqa_jax.configs"}


def test_a_checkout_has_its_configs_in_the_package():
    """`python -m kdgqa_jax...` in a checkout imports from there, whatever is installed."""
    root = pathlib.Path(__file__).parents[1]
    code = "import kdgqa_jax.configs.testing as config; print(config.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert found.returncode == 0, found.stderr
    assert pathlib.Path(found.stdout.strip()).resolve() == root / "configs" / "testing.py"
