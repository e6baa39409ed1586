"""Settings and fixtures shared by the tests."""

import pathlib

import numpy as np
import pytest
from hypothesis import settings

# Machines that run tests differ in speed, and a test that draws new numbers each time cannot be
# told from a flaky one.
settings.register_profile("kdgqa", deadline=None, derandomize=True)
settings.load_profile("kdgqa")


@pytest.fixture(scope="session")
def golden():
    """Load `tests/goldens/NAME.npz` as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(pathlib.Path(__file__).parent / "goldens" / f"{name}.npz") as data:
            return dict(data)

    return load
