"""Grouped query attention for Vision Transformers in JAX: GQA, KDGQA, DGQA and PGQA.

Modules are imported when they are first used: `from kdgqa_jax import vit` needs jax and flax alone,
and the command line starts without them. What else a module needs, an extra installs (extras.py).
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from kdgqa_jax.extras import named
from kdgqa_jax.version import __version__

if TYPE_CHECKING:
    from kdgqa_jax import allocation, attention, vit
    from kdgqa_jax.attention import GroupedQueryAttention, grouped_attention
    from kdgqa_jax.vit import create

__all__ = [
    "GroupedQueryAttention",
    "__version__",
    "allocation",
    "attention",
    "create",
    "grouped_attention",
    "vit",
]

_HOMES = {"GroupedQueryAttention": "attention", "grouped_attention": "attention", "create": "vit"}


def __getattr__(name: str) -> Any:
    """A module of the package, or what `__all__` names. Raises MissingPackageError, a UserError."""
    home = _HOMES.get(name, name)
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{home}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with named():
        module = importlib.import_module(f"{__name__}.{home}")
    return module if home == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
