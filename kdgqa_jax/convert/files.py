"""A checkpoint at a place: the arrays of its file, and the JSON files beside it."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdgqa_jax import storage, workdir
from kdgqa_jax.convert import shards
from kdgqa_jax.convert.formats import Arrays, first_line, read_arrays
from kdgqa_jax.errors import UserError, one_line

_WEIGHT_FILES = (
    "model.safetensors", shards.INDEXES[0], "open_clip_model.safetensors", "pytorch_model.bin",
    shards.INDEXES[1], "open_clip_pytorch_model.bin",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_HUB_FILES = (
    "config.json", "open_clip_config.json", "preprocessor_config.json", *_WEIGHT_FILES,
    "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin",
)  # fmt: skip


@dataclasses.dataclass
class Source:
    """What was found at a place: arrays by their name there, and the JSON files beside them."""

    path: pathlib.Path  # of the file that holds the arrays
    arrays: Arrays  # float32, but for what is no floating point number
    config: dict[str, Any]  # config.json
    preprocessor: dict[str, Any]  # preprocessor_config.json
    metadata: dict[str, Any]  # what `METADATA_KEY` holds

    def beside(self, name: str) -> dict[str, Any]:
        """What a JSON file beside the arrays holds. Raises UserError: damaged."""
        return self.config if name == "config.json" else _optional_json(self.path.parent / name)


def read(source: str) -> Source:
    """Read a file, or a directory that holds one file of weights.

    Raises UserError: nothing there, not readable, damaged, or not only arrays of floats.
    """
    path = storage.fetched(source, "source")
    try:
        if not path.exists():
            raise UserError(f"source {source} not found")
        if path.is_dir():
            path = _weights_in(path)
    except OSError as error:
        raise UserError(f"source {one_line(source)} cannot be read ({error.strerror})") from None
    if shards.is_index(path):
        arrays, metadata = shards.read_shards(path), {}
    else:
        arrays, metadata = read_arrays(path)
    if not arrays:
        raise UserError(f"{path}: holds no arrays")
    return at(path, arrays, metadata)


def at(path: pathlib.Path, arrays: Arrays, metadata: dict[str, Any]) -> Source:
    """What reading a file of these arrays at `path` gives, whether it is there yet or not.

    Raises UserError: a JSON file beside it that is damaged.
    """
    return Source(
        path,
        {name: _as_float32(x) for name, x in arrays.items()},
        _optional_json(path.parent / "config.json"),
        _optional_json(path.parent / "preprocessor_config.json"),
        metadata,
    )


def download(name: str) -> str:
    """The local directory of the Hugging Face repository `org/name`, from the cache or the hub.

    Raises UserError: it is not there, or the hub cannot be reached and the cache does not have it.
    """
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES))
    except Exception as error:
        raise UserError(
            f"hf:{name} could not be fetched from the Hugging Face hub and is not in its cache"
            f" ({first_line(error)}); check the name and the network, or download the repository"
            " elsewhere and give its directory as --source"
        ) from None


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{folder}: holds several files of weights ({names}); name one of them")
    raise UserError(
        f"{folder}: holds no weights; expected model.safetensors or pytorch_model.bin, or"
        f" one file of the kinds {', '.join(_SUFFIXES)}, or a model directory of ours (model.json"
        " and weights)"
    )


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    value = workdir.read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Floats of any width as float32; anything else as it is."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):  # infinity is refused, by its name
        return np.asarray(array, np.float32)
