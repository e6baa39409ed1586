"""What a model directory holds: sizes, allocations, norms of the key kernels."""

import os
from typing import Any

import jax
import numpy as np

from kdgqa_jax import tree_utils, vit


def fixed_allocations(
    model: vit.VisionTransformer, norm_stats: dict[str, Any]
) -> list[np.ndarray | None]:
    """By layer the allocation (K,) of every evaluation; None where the images decide about it.

    Args:
      model: any variant.
      norm_stats: its memory, layers stacked or not; {} for variants without.
    """
    norm_stats = tree_utils.unstack_layers(norm_stats)
    memories = (norm_stats.get(f"blocks_{i}", {}).get("attn", {}) for i in range(model.depth))
    found = (model.attention.fixed_allocation(memory) for memory in memories)
    return [None if x is None else np.asarray(x) for x in found]


LAYER_HEADER = ("layer", "allocation", "idle KV heads", "memory", "key kernel norms")


def summarise(directory: str | os.PathLike) -> tuple[list[tuple[str, str]], list[tuple[str, ...]]]:
    """What a model directory holds: (names and values, a row under `LAYER_HEADER` per layer).

    The allocation is that of every evaluation; that of `kdgqa` by the norms of keys depends on the
    images. The norm of a key head's kernel is its Frobenius norm.

    Raises UserError if the directory does not hold a model.
    """
    from kdgqa_jax import checkpoint

    model, variables, description = checkpoint.load_model(directory)
    variables = {
        name: tree_utils.unstack_layers(jax.device_get(v)) for name, v in variables.items()
    }
    params, memory = variables["params"], variables.get("norm_stats", {})
    names = description["class_names"]
    total, key_value = tree_utils.count_parameters(params)
    height, width = model.image_shape
    facts = {
        "attention": model.attention.variant,
        "query heads": model.attention.num_heads,
        "key/value heads": model.attention.num_kv_heads,
        "head width": _widths(*model.head_widths),
        "layers": model.depth,
        "width": model.width,
        "MLP width": model.block.mlp_width,
        "patch": f"{model.patch_size} px",
        "images": f"{height}x{width} px, channels: {description['channels']}",
        "classes": f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
        "preprocessing": ", ".join(f"{k} {v}" for k, v in description["preprocessing"].items()),
        "parameters": f"{total:,}",
        "of key and value projections": f"{key_value:,}",
        "converted from": description.get("converted", {}).get("source", "(trained)"),
    }
    rows: list[tuple[str, ...]] = []
    for i, allocation in enumerate(fixed_allocations(model, memory)):
        kernel = np.asarray(params[f"blocks_{i}"]["attn"]["key"]["kernel"], np.float32)  # DKH
        kept = memory.get(f"blocks_{i}", {}).get("attn", {})
        rows.append(
            (
                str(i),
                "by the images" if allocation is None else " ".join(map(str, allocation)),
                "" if allocation is None else str(np.sum(allocation == 0)),
                ", ".join(f"{n} {_numbers(x)}" for n, x in kept.items() if n != "allocation"),
                _numbers(np.sqrt(np.sum(kernel**2, axis=(0, 2)))),
            )
        )
    return [(name, str(value)) for name, value in facts.items()], rows


def _widths(head: int, value: int) -> str:
    return str(head) if head == value else f"{head} of queries and keys, {value} of values"


def _numbers(values: Any) -> str:
    return " ".join(f"{x:.3g}" for x in np.ravel(values))
