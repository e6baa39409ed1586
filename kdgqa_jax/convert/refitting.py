"""Refitting output projections after key/value heads were pooled or merged.

Layer after layer, from the first to the last: with the inputs that the converted model itself has
there, W_o and b_o are solved for so that the residual stream after attention is that of the
original model. Activations of both models are kept, so that all layers together cost about one
forward pass of the original and two of the converted model.

    B  batch    T  tokens    D  model width    N  query heads    H  width of one head
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import layers, sharding, vit
from kdgqa_jax.block import Block
from kdgqa_jax.convert.calibration import padded_batches
from kdgqa_jax.errors import UserError

Array = jax.Array
Variables = dict[str, Any]


def refit_output(
    kernel: np.ndarray,
    bias: np.ndarray,
    inputs: np.ndarray,
    cross: np.ndarray,
    input_mean: np.ndarray,
    target_mean: np.ndarray,
    strength: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of a target on the outputs of the heads, towards the present weights.

    Minimises E|y - W^T a - b|^2 + r |W - W_o|^2 over W and b, where a is all heads' output before
    the output projection and y the residual update that is wanted.

    Args:
      kernel: W_o (N, H, D).
      bias: (D,); takes part in nothing but the dtype: b is free.
      inputs: E[a a^T], (N*H, N*H).
      cross: E[a y^T], (N*H, D).
      input_mean: E[a], (N*H,).
      target_mean: E[y], (D,).
      strength: r as a share of the mean variance of a. Larger ones stay nearer to W_o.

    Returns:
      (kernel (N, H, D), bias (D,)) in float64.

    Raises:
      UserError: a strength that is not positive.
    """
    if not strength > 0.0:
        raise UserError(f"strength={strength} of the ridge regression must be positive")
    inputs, cross, input_mean, target_mean, old = (
        np.asarray(x, np.float64) for x in (inputs, cross, input_mean, target_mean, kernel)
    )
    size = len(input_mean)
    covariance = inputs - np.outer(input_mean, input_mean)
    wanted = cross - np.outer(input_mean, target_mean)
    ridge = strength * (np.trace(covariance) / size or 1.0)
    old = old.reshape(size, -1)
    new = np.linalg.solve(covariance + ridge * np.eye(size), wanted + ridge * old)
    return new.reshape(kernel.shape), target_mean - input_mean @ new


def refit_outputs(
    before: vit.VisionTransformer,
    before_variables: Variables,
    after: vit.VisionTransformer,
    variables: Variables,
    images: np.ndarray,
    *,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
    strength: float = 1e-3,
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """Output projections with which a converted model follows the original one.

    Args:
      before: the original model, any variant.
      before_variables: {"params": ...} and, for DGQA, "norm_stats", layers stacked or not.
      after: the converted model; it differs from `before` in its attention alone.
      variables: its variables.
      images: (n, height, width, channels) float32, normalised.
      batch_size: images at a time, as for `calibration.gather_moments`.
      mesh: of the devices; None: all of them.
      strength: of the ridge, see `refit_output`.

    Returns:
      The converted model's params, layers as they were, with new `out` kernels (N,H,D) and biases
      (D,) of the old dtypes; and by layer name ("blocks_0", ...) the share of the variance of what
      attention should add to the stream that is missed, (before, after refitting).

    Raises:
      UserError: no images, or images of another size than the models'.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    observe, go_on = _make_steps(before, after, mesh)
    whole = sharding.replicated(mesh)
    old, new = (
        {name: layers.unstack_layers(tree) for name, tree in v.items()}
        for v in (before_variables, variables)
    )
    streams, new_params = [], dict(new["params"])
    embed = jax.jit(lambda v, x: before.apply(v, x, method="embed"), out_shardings=None)
    embedding = jax.device_put(before_variables, whole)
    for batch in padded_batches(images, batch_size, mesh):
        x = embed(embedding, batch["image"])
        streams.append((x, x, batch["mask"]))

    missed = {}
    for i in range(after.depth):
        name = f"blocks_{i}"
        old_layer, new_layer = (jax.device_put(_layer(v, name), whole) for v in (old, new))
        sums, passed = _Sums(), []
        for x, y, mask in streams:
            out, found = observe(old_layer, new_layer, x, y, mask)
            sums.add(**jax.device_get(found))
            passed.append(out)
        projection = new["params"][name]["attn"]["out"]
        refitted = dict(zip(("kernel", "bias"), sums.solve(projection, strength), strict=True))
        missed[name] = (sums.missed(projection), sums.missed(refitted))
        refitted = {leaf: x.astype(projection[leaf].dtype) for leaf, x in refitted.items()}
        attention = {**new["params"][name]["attn"], "out": refitted}
        new_params[name] = {**new["params"][name], "attn": attention}
        new_layer = jax.device_put({**_layer(new, name), "params": new_params[name]}, whole)
        streams = [
            (out, go_on(new_layer, y, mask), mask)
            for out, (_, y, mask) in zip(passed, streams, strict=True)
        ]
    stacked = "blocks" in variables["params"]
    return layers.stack_layers(new_params) if stacked else new_params, missed


def _layer(variables: Variables, name: str) -> Variables:
    return {collection: tree[name] for collection, tree in variables.items() if name in tree}


@functools.lru_cache(maxsize=4)
def _make_steps(
    before: vit.VisionTransformer, after: vit.VisionTransformer, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(observe, go_on), jitted; all layers share them.

    observe: (old layer, new layer, their inputs BTD, mask (B,)) -> (output of the old layer BTD,
    sums of a batch). go_on: (layer, input, mask) -> output of the new layer.
    """
    split = sharding.batch_sharded(mesh)

    def run(model: vit.VisionTransformer, variables: Variables, x: Array, mask: Array):
        (out, _), collections = Block(**model.block_fields).apply(
            variables,
            x,
            None,
            False,
            None,
            mask,
            mutable=["inputs"],
            rngs={"noise": jax.random.key(0)},  # for pgqa with noise_at_eval only
        )
        heads = collections["inputs"]["attn"]["heads"].astype(jnp.float32)
        return out, heads.reshape(*heads.shape[:2], -1)

    @sharding.jit_for(mesh, out_shardings=(split, sharding.replicated(mesh)))
    def observe(old: Variables, new: Variables, x: Array, y: Array, mask: Array):
        exact = {"precision": jax.lax.Precision.HIGHEST}
        out, heads = run(before, old, x, mask)
        projection = old["params"]["attn"]["out"]
        kernel = projection["kernel"].reshape(-1, x.shape[-1])
        stream = x + jnp.matmul(heads, kernel, **exact) + projection["bias"]
        _, inputs = run(after, new, y, mask)
        parts = [jnp.where(mask[:, None, None], a, 0.0) for a in (inputs, stream - y)]
        tokens = jnp.sum(mask) * x.shape[1]
        means = [jnp.sum(a, axis=(0, 1)) / jnp.maximum(tokens, 1) for a in parts]
        a, b = (
            jnp.where(mask[:, None, None], part - mean, 0.0)
            for part, mean in zip(parts, means, strict=True)
        )
        return out, {
            "tokens": tokens,
            "input_mean": means[0],
            "target_mean": means[1],
            "inputs": jnp.einsum("BTI,BTJ->IJ", a, a, **exact),
            "cross": jnp.einsum("BTI,BTD->ID", a, b, **exact),
            "target": jnp.sum(jnp.square(b), axis=(0, 1)),
        }

    @sharding.jit_for(mesh, out_shardings=split)
    def go_on(variables: Variables, x: Array, mask: Array):
        return run(after, variables, x, mask)[0]

    return observe, go_on


class _Sums:
    """Batches' sums added up in float64: a the heads' outputs, y what attention should add."""

    def __init__(self):
        self._tokens, self._sums = 0.0, None

    def add(self, tokens: Any, input_mean: Any, target_mean: Any, **centred: Any) -> None:
        n = float(tokens)
        a, y = np.asarray(input_mean, np.float64), np.asarray(target_mean, np.float64)
        products = {"inputs": np.outer(a, a), "cross": np.outer(a, y), "target": y * y}
        sums = {name: centred[name] + n * product for name, product in products.items()}
        sums |= {"input_mean": n * a, "target_mean": n * y}
        before = self._sums or dict.fromkeys(sums, 0.0)
        self._sums = {name: before[name] + x for name, x in sums.items()}
        self._tokens += n

    def _mean(self, name: str) -> np.ndarray:
        return self._sums[name] / self._tokens

    def solve(self, projection: dict[str, Any], strength: float) -> tuple[np.ndarray, np.ndarray]:
        names = ("inputs", "cross", "input_mean", "target_mean")
        moments = (self._mean(name) for name in names)
        return refit_output(projection["kernel"], projection["bias"], *moments, strength)

    def missed(self, projection: dict[str, Any]) -> float:
        """E|y - W^T a - b|^2 as a share of the variance of y."""
        a, y = self._mean("input_mean"), self._mean("target_mean")
        kernel = np.asarray(projection["kernel"], np.float64).reshape(len(a), -1)
        covariance = self._mean("inputs") - np.outer(a, a)
        cross = self._mean("cross") - np.outer(a, y)
        variance = float(np.sum(self._mean("target") - y * y))
        offset = y - a @ kernel - np.asarray(projection["bias"], np.float64)
        error = np.sum(kernel * (covariance @ kernel - 2.0 * cross)) + np.sum(offset**2)
        return float(max(variance + error, 0.0) / variance) if variance > 0.0 else 0.0
