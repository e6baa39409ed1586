"""Reading the arrays of a checkpoint. Nothing that a file brings with it is run.

The kind of a file is told by its first bytes, not by its name: safetensors, a PyTorch pickle (read
by torch with `weights_only=True`) or a NumPy .npz (read with `allow_pickle=False`).
"""

import dataclasses
import json
import pathlib
import re
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdgqa_jax import workdir
from kdgqa_jax.errors import UserError

Arrays = dict[str, np.ndarray]

METADATA_KEY = "kdgqa_jax"
"""Under this name the header of a safetensors file that we wrote says how to build its model."""

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_HUB_FILES = ("config.json", "preprocessor_config.json", *_WEIGHT_FILES)


@dataclasses.dataclass
class Source:
    """What was found at a place: arrays by their name there, and the JSON files beside them."""

    path: pathlib.Path  # of the file that holds the arrays
    arrays: Arrays  # float32, but for what is no floating point number
    config: dict[str, Any]  # config.json
    preprocessor: dict[str, Any]  # preprocessor_config.json
    metadata: dict[str, Any]  # what `METADATA_KEY` holds


def read(source: str) -> Source:
    """Read a file, or a directory that holds one file of weights.

    Raises UserError: nothing there, not readable, damaged, or not only arrays of floats.
    """
    path = pathlib.Path(source)
    if not path.exists():
        raise UserError(f"source {source} not found")
    if path.is_dir():
        path = _weights_in(path)
    arrays, metadata = _read_arrays(path)
    if not arrays:
        raise UserError(f"{path}: holds no arrays")
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
            f" ({_first_line(error)}); check the name and the network, or download the repository"
            " elsewhere and give its directory as --source"
        ) from None


def _weights_in(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob("*.index.json")):
        raise UserError(
            f"{folder}: the weights are in several shards, which is not read; save the model again"
            " in one file (save_pretrained(..., max_shard_size='100GB'))"
        )
    found = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{folder}: holds several files of weights ({names}); name one of them")
    raise UserError(
        f"{folder}: holds no weights; expected {' or '.join(_WEIGHT_FILES)}, or one file of the"
        f" kinds {', '.join(_SUFFIXES)}, or a model directory of ours (model.json and weights)"
    )


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    value = workdir.read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


# --- kinds of files -----------------------------------------------------------------------------


def _read_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a file, and our metadata if it has any."""
    kind, reader = _kind(path)
    try:
        return reader(path)
    except UserError:
        raise
    except Exception as error:  # parsers of damaged files raise anything
        raise UserError(
            f"{path}: damaged, or not a {kind} ({_first_line(error)}); fetch or save it again"
        ) from None


def _kind(path: pathlib.Path) -> tuple[str, Callable[[pathlib.Path], Any]]:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: empty file")
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                numpy = any(name.endswith(".npy") for name in archive.namelist())
        except Exception as error:
            raise UserError(f"{path}: damaged zip file ({_first_line(error)})") from None
        return ("NumPy .npz file", _read_npz) if numpy else ("PyTorch file", _read_torch)
    if head[:1] == b"\x80":
        return "PyTorch file", _read_torch
    if head[8:9] == b"{":
        return "safetensors file", _read_safetensors
    raise UserError(
        f"{path}: unknown kind of file; expected safetensors, a PyTorch state dict or a NumPy .npz"
    )


def _read_safetensors(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        if not isinstance(metadata, dict) or not isinstance(metadata.get("model", {}), dict):
            raise ValueError(f"metadata {METADATA_KEY} of another form")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return arrays, metadata


def _read_npz(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    # NumPy forgets what bfloat16 is called: two bytes of no type.
    half = {name: x.view(jnp.bfloat16) for name, x in arrays.items() if x.dtype == np.dtype("V2")}
    return arrays | half, {}


def _read_torch(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a PyTorch file, and reading it needs torch: pip install"
            ' "kdgqa-jax[torch]", or save it as safetensors where torch is'
        ) from None
    import pickle

    try:
        zipped = zipfile.is_zipfile(path)
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise
        raise UserError(
            f"{path}: refused, not run: beside tensors it holds {named[1]}; save its state dict"
            " alone, or as safetensors, where it comes from"
        ) from None
    for wrapper in ("model", "state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    if not isinstance(tree, dict) or not all(isinstance(x, torch.Tensor) for x in tree.values()):
        raise UserError(
            f"{path}: not a state dict; expected names and tensors, or such a dict under 'model' or"
            " 'state_dict'"
        )
    return {str(name): _from_torch(x) for name, x in tree.items()}, {}


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Floats of any width as float32; anything else as it is."""
    return np.asarray(array, np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array
