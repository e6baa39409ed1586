"""The version, in one place, and those of what the numbers depend on."""

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what the numbers depend on."""
    import contextlib
    import importlib.metadata
    import platform

    packages = ("kdgqa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found}
