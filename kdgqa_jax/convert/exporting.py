"""Back to PyTorch names: safetensors as timm reads them, and .pth as the released code does.

A file is written only if reading it gives the same model again: what a format cannot hold is
refused by its name, whatever options models will have.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from kdgqa_jax import checkpoint, extras, options, tree_utils, vit, workdir
from kdgqa_jax.convert import files, importing, structure
from kdgqa_jax.convert.formats import METADATA_KEY, Arrays
from kdgqa_jax.convert.sources import LAYOUTS
from kdgqa_jax.errors import UserError, unknown


def to_pytorch(
    model: vit.VisionTransformer, variables: dict[str, Any], layout: str | None = None
) -> Arrays:
    """The arrays of a model under PyTorch names and in PyTorch's form, float32.

    Args:
      model: any variant.
      variables: {"params": ..., "norm_stats": ...}, layers stacked or not. The key norms of DGQA
        become the cache of the released code.
      layout: "timm" (fused qkv; only for `mha`, and equal groups with K == N), "released" (q, k and
        v apart) or None: "timm" where it is possible.

    Raises:
      UserError: another layout, or "timm" for what it has no place for.
    """
    arrays = _arrays(model, variables, layout)
    return {name: x.astype(np.float32, copy=False) for name, x in arrays.items()}


def _arrays(
    model: vit.VisionTransformer, variables: dict[str, Any], layout: str | None = None
) -> Arrays:
    """As `to_pytorch`, in the model's own dtypes."""
    grouped = model.attention.num_kv_heads != model.attention.num_heads
    ruled = model.attention.rule.dynamic
    if layout is None and not (grouped or ruled):
        try:
            return _arrays(model, variables, "timm")
        except UserError:  # timm's blocks cannot be such ones
            return _arrays(model, variables, "released")
    layout = layout or "released"
    if layout not in ("timm", "released"):
        raise unknown("layout", layout, ("timm", "released"))
    narrow = len(set(model.head_widths)) > 1
    if layout == "timm" and (grouped or ruled or narrow):
        what = "grouped heads" if grouped else "values of another width than keys"
        what = f"the groups of {model.attention.variant}" if ruled else what
        raise UserError(f"timm's fused qkv has no place for {what}; use layout 'released'")
    arrays: Arrays = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    table = LAYOUTS[layout]
    for collection, tree in variables.items():
        flat = flatten_dict(tree_utils.unstack_layers(jax.device_get(tree)), sep="/")
        for path, x in flat.items():
            found = table.theirs(path)
            if found is None and collection == "norm_stats":
                continue
            if found is None:
                raise UserError(f"the layout of {table.title} has no place for {path}")
            name, part = found
            written = np.ascontiguousarray(table.transform(path).write(np.asarray(x)))
            if part is None:
                arrays[name] = written
            else:
                parts.setdefault(name, {})[part.number] = written
    fused = {name: np.concatenate([x[i] for i in sorted(x)]) for name, x in parts.items()}
    return table.closing(arrays | fused)


def export(directory: str | os.PathLike, path: str | os.PathLike, to: str = "safetensors") -> None:
    """Write the model in a model directory to one file of PyTorch names.

    Args:
      directory: a model directory.
      path: the file to write.
      to: "safetensors" (fused qkv as timm reads it, or q, k and v where heads are grouped; the
        header says all that `load` needs to build the same model) or "released" (.pth, q, k and v,
        as the released code reads it; needs torch).

    Raises:
      UserError: no model there, something at `path`, another kind of file, no torch, or a model
        with options or a memory that the file could not say.
    """
    writers = {"safetensors": _safetensors, "released": _released}
    if to not in writers:
        raise unknown("export", to, writers)
    path = workdir.check_new(path)
    model, variables, description = checkpoint.load_model(directory)
    arrays, metadata, write = writers[to](model, variables, description)
    if lost := _lost(path, arrays, metadata, model, variables):
        kind, remedy = "safetensors file", "keep the model directory"
        if to == "released":
            kind, remedy = "file of the released code", "--to safetensors keeps everything"
        raise UserError(f"{path}: a {kind} cannot say {', '.join(lost)}; {remedy}")
    with workdir.written_file(path) as temporary:
        write(temporary)


def _safetensors(
    model: vit.VisionTransformer, variables: dict[str, Any], description: dict[str, Any]
) -> tuple[Arrays, dict[str, Any], Any]:
    """(arrays, metadata, what writes them to a path)."""
    from safetensors.numpy import save_file

    flat = flatten_dict(tree_utils.unstack_layers(variables.get("norm_stats", {})), sep="/")
    metadata = {
        "model": {"name": description["model"]["name"], **vit.arguments(model)},
        "class_names": description["class_names"],
        "preprocessing": description["preprocessing"],
        "norm_stats": {path: np.asarray(x).tolist() for path, x in flat.items()},
    }
    arrays = _arrays(model, variables)
    header = {"format": "pt", METADATA_KEY: json.dumps(metadata)}
    return arrays, metadata, lambda path: save_file(arrays, path, metadata=header)


def _released(
    model: vit.VisionTransformer, variables: dict[str, Any], description: dict[str, Any]
) -> tuple[Arrays, dict[str, Any], Any]:
    """(arrays, no metadata, what writes them to a path)."""
    extras.needs("torch", "writing a .pth file", instead="use safetensors")
    import torch

    arrays = _arrays(model, variables, "released")

    def tensor(x: np.ndarray) -> torch.Tensor:
        if x.dtype.name == "bfloat16":  # which torch does not take from NumPy
            return torch.tensor(x.astype(np.float32)).to(torch.bfloat16)
        return torch.tensor(x)

    def write(path: pathlib.Path) -> None:
        torch.save({name: tensor(x) for name, x in arrays.items()}, path)

    return arrays, {}, write


_SIZES = ("norm_pooled", "head_width", "v_head_width")
"""Options that may be the reason why a file without metadata cannot be read."""


def _lost(
    path: pathlib.Path,
    arrays: Arrays,
    metadata: dict[str, Any],
    model: vit.VisionTransformer,
    variables: dict[str, Any],
) -> list[str]:
    """What of a model would be another one, unnoticed, when the file at `path` is read: in words.

    A config.json that lies there counts.
    """
    if any(x.dtype.itemsize > 4 for x in arrays.values()):  # files are read as float32
        return [f"param_dtype={model.param_dtype!r}"]
    own = vit.arguments(model)
    try:
        found = _read_again(files.at(path, arrays, metadata), model.attention.num_heads)
    except UserError as error:
        more = {name: own[name] for name in _SIZES if own[name] is not None}
        more = [*structure.extras(own), *(f"{name}={value!r}" for name, value in more.items())]
        return more or [f"what reading it takes ({error})"]
    variant = found.arguments["attention"]
    if variant not in (None, own["attention"]):
        name = f"{path.stem}_{own['attention']}{path.suffix}"
        return [f"attention={own['attention']!r} but by its name (such as {name})"]
    arguments = {**found.arguments, "attention": own["attention"]}
    read = vit.arguments(vit.create(**arguments))
    for said in (own, read):
        said["dtype"] = said["dtype"] or "float32"  # of images
    # No prediction depends on how a model is trained and computed but for rounding.
    unsaid = set(options.names(vit.known_options(), options.RUN, options.PROGRAM)) - {"dtype"}
    lost = [
        f"{name}={value!r}"
        for name, value in own.items()
        if read[name] != value and name not in unsaid
    ]
    memory = flatten_dict(tree_utils.unstack_layers(variables.get("norm_stats", {})), sep="/")
    other = {
        path.split("/")[-1]
        for path, x in memory.items()
        if not np.array_equal(found.norm_stats.get(path, ()), x, equal_nan=True)
    }
    return lost + [f"the {name} that it remembers" for name in sorted(other)]


def _read_again(source: files.Source, num_heads: int) -> importing.Loaded:
    """With the number of query heads where the reader asks for it."""
    try:
        return importing.from_source(source)
    except UserError:
        return importing.from_source(source, num_heads)
