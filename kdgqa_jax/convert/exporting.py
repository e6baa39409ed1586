"""Back to PyTorch names: safetensors as timm reads them, and .pth as the released code does."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from kdgqa_jax import checkpoint, layers, vit, workdir
from kdgqa_jax.convert.files import METADATA_KEY, Arrays
from kdgqa_jax.convert.layouts import LAYOUTS
from kdgqa_jax.errors import UserError, unknown


def to_pytorch(
    model: vit.VisionTransformer, variables: dict[str, Any], layout: str | None = None
) -> Arrays:
    """The arrays of a model under PyTorch names and in PyTorch's form, float32.

    Args:
      model: any variant.
      variables: {"params": ..., "norm_stats": ...}, layers stacked or not. The key norms of DGQA
        become the cache of the released code.
      layout: "timm" (fused qkv; only for K == N), "released" (q, k and v apart) or None: "timm"
        where it is possible.

    Raises:
      UserError: another layout, or "timm" for grouped heads.
    """
    grouped = model.attention["num_kv_heads"] != model.attention["num_heads"]
    layout = layout or ("released" if grouped else "timm")
    if layout not in ("timm", "released"):
        raise unknown("layout", layout, ("timm", "released"))
    if layout == "timm" and grouped:
        raise UserError("timm's fused qkv has no place for grouped heads; use layout 'released'")
    arrays: Arrays = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    table = LAYOUTS[layout]
    for tree in variables.values():
        flat = flatten_dict(layers.unstack_layers(jax.device_get(tree)), sep="/")
        for path, x in flat.items():
            found = table.theirs(path)
            if found is None:  # an allocation, which follows from the norms
                continue
            name, third = found
            written = np.ascontiguousarray(table.transform(path).write(np.asarray(x, np.float32)))
            if third is None:
                arrays[name] = written
            else:
                thirds.setdefault(name, {})[third] = written
    fused = {name: np.concatenate([x[i] for i in range(3)]) for name, x in thirds.items()}
    return arrays | fused


def export(directory: str | os.PathLike, path: str | os.PathLike, to: str = "safetensors") -> None:
    """Write the model in a model directory to one file of PyTorch names.

    Args:
      directory: a model directory.
      path: the file to write.
      to: "safetensors" (fused qkv as timm reads it, or q, k and v where heads are grouped; the
        header says what `load` needs to build the same model) or "released" (.pth, q, k and v, as
        the released code reads it; needs torch).

    Raises:
      UserError: no model there, something at `path`, another kind of file, no torch.
    """
    writers = {"safetensors": _write_safetensors, "released": _write_released}
    if to not in writers:
        raise unknown("export", to, writers)
    path = workdir.check_new(path)
    model, variables, description = checkpoint.load_model(directory)
    with workdir.written_file(path) as temporary:
        writers[to](temporary, model, variables, description)


def _write_safetensors(
    path: pathlib.Path,
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    description: dict[str, Any],
) -> None:
    from safetensors.numpy import save_file

    flat = flatten_dict(layers.unstack_layers(variables.get("norm_stats", {})), sep="/")
    numbers = {name: getattr(model, name) for name in ("width", "depth", "mlp_width")}
    metadata = {
        "model": {**description["model"], **numbers, "num_heads": model.attention["num_heads"]},
        "class_names": description["class_names"],
        "preprocessing": description["preprocessing"],
    }
    metadata["allocation"] = {
        path: np.asarray(x).tolist() for path, x in flat.items() if path.endswith("/allocation")
    }
    arrays = to_pytorch(model, variables)
    save_file(arrays, path, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)})


def _write_released(
    path: pathlib.Path,
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    description: dict[str, Any],
) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(
            'writing a .pth file needs torch: pip install "kdgqa-jax[torch]", or use safetensors'
        ) from None
    arrays = to_pytorch(model, variables, "released")
    torch.save({name: torch.tensor(x) for name, x in arrays.items()}, path)
