"""The arrays in one file: safetensors, NumPy's .npz, or what torch writes. Nothing in it is run.

The kind of a file is recognised by its contents, never by its name. A file is never given more
memory than a few times its size, whatever it declares to hold.
"""

import collections
import json
import math
import pathlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdgqa_jax import extras
from kdgqa_jax.errors import UserError, one_line, some

Arrays = dict[str, np.ndarray]

METADATA_KEY = "kdgqa_jax"
"""Under this name the header of a safetensors file that we wrote says how to build its model."""

_WRAPPERS = ("model", "state_dict")
_LONGEST_HEADER = 100_000_000  # bytes; what safetensors itself allows
_UNPACKED = 4  # times the size of the file: what its arrays may take
_SMALL = 2**26  # bytes that any file may unpack to

_SAFETENSORS_NUMBERS = (
    {"BOOL", "F16", "BF16", "F32", "F64"}
    | {f"I{bits}" for bits in (8, 16, 32, 64)}
    | {f"U{bits}" for bits in (8, 16, 32, 64)}
)  # fmt: skip


def read_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays of a file by name, and our metadata if it has any.

    Raises UserError: of no known kind, damaged, or it holds more than plain arrays.
    """
    kind, reader = _kind(path)
    try:
        with warnings.catch_warnings():  # torch's on tensors that are refused here
            warnings.simplefilter("ignore")
            return reader(path)
    except UserError:
        raise
    except Exception as error:  # parsers of damaged files raise anything
        raise UserError(
            f"{path}: damaged, or not a {kind} ({first_line(error)}); fetch or save it again"
        ) from None


def first_line(error: BaseException) -> str:
    """The kind of an error and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {one_line(lines[0])}" if lines else type(error).__name__


def _kind(path: pathlib.Path) -> tuple[str, Callable[[pathlib.Path], Any]]:
    """(what the file is, its reader).

    safetensors comes first: the first byte of such a file is the low byte of the header's length,
    so it can be that of a pickle (0x80) or of a zip file (PK).
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{path}: empty file")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= _LONGEST_HEADER:
        if 8 + length > path.stat().st_size:
            raise UserError(
                f"{path}: damaged safetensors file, cut off in its header; fetch it again"
            )
        return "safetensors file", _read_safetensors
    if head[:2] == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception as error:
            raise UserError(f"{path}: damaged zip file ({first_line(error)})") from None
        _refuse_repeated(path, names)
        numpy = any(name.endswith(".npy") for name in names)
        return ("NumPy .npz file", _read_npz) if numpy else ("PyTorch file", _read_torch)
    if head[:1] == b"\x80":
        return "PyTorch file", _read_torch
    raise UserError(
        f"{path}: unknown kind of file; expected safetensors, a PyTorch state dict or a NumPy .npz"
    )


# --- what is refused ----------------------------------------------------------------------------


def _refuse_repeated(path: pathlib.Path, names: Iterable[str]) -> None:
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: holds more than one array or record of the name {some(repeated)}; save it"
            " again"
        )


def _refuse_special(path: pathlib.Path, special: dict[str, str]) -> None:
    if special:
        shown = some(f"{name} ({kind})" for name, kind in special.items())
        raise UserError(
            f"{path}: holds tensors that are no dense arrays of plain numbers: {shown}; save them"
            " dense and dequantized, in float32, bfloat16 or float16, where they come from"
        )


def _check_unpacked(path: pathlib.Path, size: int) -> None:
    packed = path.stat().st_size
    if size > max(_UNPACKED * packed, _SMALL):
        raise UserError(
            f"{path}: refused, not unpacked: its {packed:,} bytes would become {size:,}; save the"
            " arrays uncompressed (numpy.savez, torch.save) where they come from"
        )


# --- readers ------------------------------------------------------------------------------------


def _read_safetensors(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    import ml_dtypes  # noqa: F401  (makes bfloat16 known to NumPy)
    from safetensors import safe_open

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        pairs = json.loads(file.read(length), object_pairs_hook=lambda pairs: pairs)
    _refuse_repeated(path, (name for name, _ in pairs))
    kinds = {name: dict(entry).get("dtype") for name, entry in pairs if name != "__metadata__"}
    _refuse_special(path, {n: k for n, k in kinds.items() if k not in _SAFETENSORS_NUMBERS})
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: its metadata {METADATA_KEY!r} is no JSON object; export it again")
    return arrays, metadata


def _read_npz(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        _refuse_repeated(path, (info.filename.removesuffix(".npy") for info in archive.infolist()))
        _check_unpacked(path, sum(info.file_size for info in members.values()))
        arrays = {}
        for name, info in members.items():
            with archive.open(info) as file:
                _check_npy(file, info.file_size)
            with archive.open(info) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    # NumPy forgets what bfloat16 is called: two bytes of no type.
    bfloat16 = jnp.dtype("bfloat16")
    half = {name: x.view(bfloat16) for name, x in arrays.items() if x.dtype == np.dtype("V2")}
    return arrays | half, {}


def _check_npy(file: Any, size: int) -> None:
    """Raise ValueError if the header of a .npy declares another size than there is."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"a .npy member of version {version}")
    shape, _, dtype = readers[version](file)
    declared = file.tell() + math.prod(shape) * dtype.itemsize
    if declared != size and not dtype.hasobject:
        raise ValueError(f"a .npy member of {size} bytes declares {declared}")


def _read_torch(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    extras.needs(
        "torch",
        f"{path} is a PyTorch file, and reading it",
        instead="save it as safetensors where torch is",
    )
    tensors = _state_dict(path, _torch_load(path))
    _refuse_special(path, {name: kind for name, x in tensors.items() if (kind := _special(x))})
    # Views can declare any size: of an expanded tensor, or of many that share one storage.
    _check_unpacked(path, sum(x.numel() * x.element_size() for x in tensors.values()))
    return {name: _from_torch(x) for name, x in tensors.items()}, {}


def _torch_load(path: pathlib.Path) -> Any:
    import pickle

    import torch

    mapped = False
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            # Mapped into memory, records are not checked; torch may have written no checksums.
            structure = [r for r in records if r.filename.endswith("data.pkl") and r.CRC]
            _check_unpacked(path, sum(record.file_size for record in records))
            for record in structure:
                archive.read(record)
        mapped = all(record.compress_type == zipfile.ZIP_STORED for record in records)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise
        raise UserError(
            f"{path}: refused, not run: beside tensors it holds {named[1]}; save its state dict"
            " alone, or as safetensors, where it comes from"
        ) from None


def _state_dict(path: pathlib.Path, tree: Any) -> dict[str, Any]:
    """The tensors by name, wherever they are in what `torch.load` gave."""
    import torch

    for _ in range(2):  # one wrapper may be in another
        inner = [n for n in _WRAPPERS if isinstance(tree, dict) and isinstance(tree.get(n), dict)]
        if len(inner) > 1:
            raise UserError(
                f"{path}: holds two state dicts, under {' and '.join(map(repr, inner))}; save the"
                " one that is meant alone"
            )
        tree = tree[inner[0]] if inner else tree
    if not isinstance(tree, dict) or not all(isinstance(x, torch.Tensor) for x in tree.values()):
        raise UserError(
            f"{path}: not a state dict; expected names and tensors, or such a dict under 'model' or"
            " 'state_dict'"
        )
    _refuse_repeated(path, map(str, tree))
    return {str(name): x for name, x in tree.items()}


def _special(tensor: Any) -> str:
    """What makes a tensor more than a dense array of plain numbers; "" if nothing does."""
    import torch

    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    name = str(tensor.dtype).removeprefix("torch.")
    plain = name in ("float64", "float32", "float16", "bfloat16", "bool")
    whole = re.fullmatch(r"u?int(8|16|32|64)", name)
    if tensor.is_nested:
        return "nested"
    return "" if (plain or whole) and tensor.device.type == "cpu" else f"{name} {tensor.device}"


def _from_torch(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
