"""Trees of variables: the two layouts of the layers, what was sown in them, their sizes.

Unrolled layers are `blocks_0`, `blocks_1`, ...; scanned ones one `blocks` with a leading L axis.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdgqa_jax.errors import UserError

Array = jax.Array


def stack_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """`blocks_0`.. -> `blocks` with a leading L axis (the layout of scan_layers=True).

    Works on `params` and on any collection; a stacked tree passes through.
    """
    names = sorted((k for k in tree if re.fullmatch(r"blocks_\d+", k)), key=lambda k: int(k[7:]))
    if not names:
        return tree
    rest = {k: v for k, v in tree.items() if k not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[k] for k in names))
    return {**rest, "blocks": stacked}


def unstack_layers(tree: dict[str, Any]) -> dict[str, Any]:
    """`blocks` with a leading L axis -> `blocks_0`..; an unstacked tree passes through."""
    if "blocks" not in tree:
        return tree
    rest = {k: v for k, v in tree.items() if k != "blocks"}
    depth = jax.tree.leaves(tree["blocks"])[0].shape[0]
    layers = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], tree["blocks"]) for i in range(depth)
    }
    return {**rest, **layers}


def is_stacked(tree: Any) -> bool | None:
    """If the layers somewhere in a tree are stacked; None: it holds no layers."""
    branches = jax.tree.leaves(tree, is_leaf=_has_layers)
    return next(("blocks" in branch for branch in branches if _has_layers(branch)), None)


def in_layout(tree: Any, stacked: bool) -> Any:
    """The same with every branch of layers in it, those of an optimizer among them, in a layout.

    Raises ValueError: layers whose branches differ cannot be stacked.
    """
    layout = stack_layers if stacked else unstack_layers
    return jax.tree.map(lambda x: layout(x) if _has_layers(x) else x, tree, is_leaf=_has_layers)


def _has_layers(tree: Any) -> bool:
    return isinstance(tree, dict) and ("blocks" in tree or "blocks_0" in tree)


def map_attention(function: Callable[..., Any], *trees: dict[str, Any]) -> dict[str, Any]:
    """Apply a function to what collections hold of each attention layer.

    Args:
      function: (what the first tree holds of a layer, what the second one holds, ...) -> a tree.
      *trees: collections, layers stacked or not; the layers of the first one count.

    Returns:
      {"blocks_0": {"attn": ...}, ...} or, layers stacked, {"blocks": {"attn": ...}}.
    """
    mapped = {}
    for name in trees[0]:
        of_layer = jax.vmap(function) if name == "blocks" else function
        mapped[name] = {"attn": of_layer(*(tree[name]["attn"] for tree in trees))}
    return mapped


def widened(tree: Any) -> Any:
    """Arrays of half precision as float32, others as they are: what conversions compute with."""

    def wide(x: Any) -> Any:
        half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return x.astype(np.float32) if half else x

    return jax.tree.map(wide, tree)


def cast(tree: Any, dtype: Any) -> Any:
    """Every array as `dtype`, in NumPy. Raises UserError where that makes numbers infinite."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    with np.errstate(over="ignore"):
        narrow = jax.tree.map(lambda x: np.asarray(x).astype(dtype, copy=False), tree)
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(narrow), strict=True)
    for (path, x), y in pairs:
        if x.dtype != dtype and np.isfinite(x).all() and not np.isfinite(y).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{name} holds numbers too large for {dtype}; use bfloat16 or float32")
    return narrow


def only(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The branches of a tree that end in `name`."""
    flat = flatten_dict(tree)
    return unflatten_dict({path: x for path, x in flat.items() if path[-1] == name})


def grouping_of(collections: dict[str, Any]) -> dict[str, Array]:
    """The sown `grouping` collection by layer: key_norm and allocation (L, K), group_index (L, N).

    With allocation_scope="example" a batch axis follows the layer axis.
    """
    return stack_layers(collections["grouping"])["blocks"]["attn"]


def allocations_by_batch(allocation: np.ndarray, count: int) -> list[np.ndarray]:
    """The (L, K) allocations of a batch: its one, or from (L, B, K) those of its `count` images."""
    return [allocation] if allocation.ndim == 2 else list(np.moveaxis(allocation[:, :count], 1, 0))


def allocations_by_frequency(allocations: list[np.ndarray]) -> list[np.ndarray]:
    """Per layer the different allocations of n batches or images, the most frequent first: (m, K).

    On a tie the one with the smaller entries, from the first key/value head on, comes first.
    """
    ranked = []
    for rows in np.stack(allocations, axis=1):  # (n, K) of a layer
        different, counts = np.unique(rows, axis=0, return_counts=True)
        ranked.append(different[np.argsort(-counts, kind="stable")])
    return ranked


def count_parameters(params: dict[str, Any]) -> tuple[int, int]:
    """(all parameters, those of the key and value projections), layers in either layout."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [({entry.key for entry in path}, x.size) for path, x in leaves]
    kv = sum(size for names, size in sizes if "attn" in names and names & {"key", "value"})
    return sum(size for _, size in sizes), kv
