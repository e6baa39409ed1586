"""Packages that only some functions need: which extra installs them, and the sentence that says so.

The core (allocation, rules, kernels, attention, block, vit) needs jax, flax and numpy alone.
"""

import contextlib
import importlib.util
from collections.abc import Iterator

from kdgqa_jax.errors import UserError

_CONVERT = ("safetensors", "huggingface_hub", "PIL", "rich", "orbax", "flatbuffers")
_TRAIN = (*_CONVERT, "ml_collections", "optax", "grain", "tensorboardX")
_DATA = ("PIL", "sklearn", "tensorflow_datasets", "importlib_resources")
_DEMO = (*_TRAIN, *_DATA, "scipy", "matplotlib", "jinja2")

EXTRAS: dict[str, tuple[str, ...]] = {
    "convert": _CONVERT,
    "train": _TRAIN,
    "data": _DATA,
    "demo": _DEMO,
    "torch": ("torch",),
    "encoders": ("tokenizers",),
    "prepare": ("tensorflow",),
    "cloud": ("etils", "gcsfs", "s3fs"),
    "wandb": ("wandb",),
    "all": (*_DEMO, "tokenizers"),
}
"""The packages, as they are imported, of the extras that users ask for, small ones first."""


class MissingPackageError(UserError, ImportError):
    """A package that a function needs is not installed; the sentence names the extra.

    Attributes:
      name: the package, as it is imported.
      what: what needs it.
    """

    def __init__(self, package: str, what: str, extra: str, instead: str = ""):
        hint = f", or {instead}" if instead else ""
        super().__init__(
            f'{what} needs the package {package}: pip install "kdgqa-jax[{extra}]"{hint}'
        )
        self.name, self.what = package, what


SOMETHING = "this"


def needs(package: str, what: str = SOMETHING, instead: str = "") -> None:
    """Raise MissingPackageError unless `package` can be imported; it is not imported.

    Args:
      package: as it is imported; one of `EXTRAS`.
      what: what needs it: the subject of the sentence.
      instead: what can be done without the package.
    """
    try:
        found = importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, which stands in for the package
        found = True
    if not found:
        raise MissingPackageError(package, what, _first(package), instead)


@contextlib.contextmanager
def named(what: str = SOMETHING, extra: str = "") -> Iterator[None]:
    """Raise MissingPackageError where a package of `EXTRAS` cannot be imported in the block.

    Packages of no extra raise what they raise.

    Args:
      what: as for `needs`.
      extra: named if it holds the package; otherwise the first that does is.
    """
    try:
        yield
    except (ModuleNotFoundError, MissingPackageError) as error:
        if getattr(error, "what", SOMETHING) != SOMETHING:  # which says more
            raise
        package = (error.name or "").partition(".")[0]
        if not any(package in packages for packages in EXTRAS.values()):
            raise
        holds = package in EXTRAS.get(extra, ())
        raise MissingPackageError(package, what, extra if holds else _first(package)) from error


def _first(package: str) -> str:
    return next(name for name, packages in EXTRAS.items() if package in packages)
