"""Refitting output projections after key/value heads were pooled or merged.

Layer after layer, from the first to the last: with the inputs that the converted model itself has
there, W_o and b_o are solved for so that the residual stream after attention is that of the
original model; `FOLLOWED` says what that means in each order of a block's parts. LayerScale is part
of the projection that is solved for. Activations of both models are kept, so that all layers
together cost about one forward pass of the original and two of the converted model.

    B  batch    T  tokens    D  model width    N  query heads    H  width of one head
"""

import dataclasses
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


# --- what is followed ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a block did, BTD each: its input, what attention gave with LayerScale, its output."""

    x: Array
    attention: Array
    out: Array


@dataclasses.dataclass(frozen=True)
class Followed:
    """What a converted model's attention should give.

    Attributes:
      what: its name in reports.
      wanted: (what the original block did, what the converted one did) -> BTD, of which nothing
        depends on the converted output projection.
    """

    what: str
    wanted: Callable[[_Seen, _Seen], Array]


FOLLOWED: dict[str, Followed] = {
    "pre_norm": Followed(
        "what attention should add", lambda old, new: old.x + old.attention - new.x
    ),
    "parallel": Followed(  # the MLP beside it adds what it does
        "what attention should add", lambda old, new: old.out - (new.out - new.attention)
    ),
    # A norm follows, so that no solution is linear in the stream: attention is followed before it.
    "post_norm": Followed(
        "what attention should give to the norm after it", lambda old, new: old.attention
    ),
}
"""By the order of a block's parts, as `block.ORDERS`."""


# --- the solution -------------------------------------------------------------------------------


def refit_output(
    kernel: np.ndarray,
    bias: np.ndarray | None,
    inputs: np.ndarray,
    cross: np.ndarray,
    input_mean: np.ndarray,
    target_mean: np.ndarray,
    strength: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ridge regression of a target on the outputs of the heads, towards the present weights.

    Minimises `E|y - W^T a - b|^2 + r |W - W_o|^2` over W and b, where a is all heads' output before
    the output projection and y the residual update that is wanted.

    Args:
      kernel: W_o (N, H, D).
      bias: (D,); its numbers take no part: b is free. None: there is none, and moments should be
        about zero (means of zero).
      inputs: E[a a^T], (N*H, N*H).
      cross: E[a y^T], (N*H, D).
      input_mean: E[a], (N*H,).
      target_mean: E[y], (D,).
      strength: r as a share of the mean variance of a. Larger ones stay nearer to W_o.

    Returns:
      (kernel (N, H, D), bias (D,) or None) in float64.

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
    offset = None if bias is None else target_mean - input_mean @ new
    return new.reshape(kernel.shape), offset


def _with_scale(projection: dict[str, Any], scale: Any) -> dict[str, np.ndarray]:
    """Kernel, and bias if there is one, with LayerScale (D,) folded in: float64."""
    return {leaf: np.asarray(x, np.float64) * scale for leaf, x in projection.items()}


def _without_scale(
    folded: dict[str, np.ndarray], scale: Any, projection: dict[str, Any]
) -> dict[str, np.ndarray]:
    """The projection in front of LayerScale; as it was where that is zero and lets nothing out."""
    return {
        leaf: np.divide(x, scale, out=np.array(projection[leaf], np.float64), where=scale != 0.0)
        for leaf, x in folded.items()
    }


# --- layer after layer --------------------------------------------------------------------------


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
      (D,), where there are any, of the old dtypes; and by layer name ("blocks_0", ...) the share of
      the variance of what attention should add to the stream (see `FOLLOWED`; without a bias, of
      its mean square) that is missed, (before, after refitting).

    Raises:
      UserError: no images, images of another size than the models', or numbers too large for the
        dtype of the projection.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    observe, go_on = _make_steps(before, after, mesh)
    whole = sharding.replicated(mesh)
    old, new = (
        {name: layers.unstack_layers(tree) for name, tree in v.items()}
        for v in (before_variables, variables)
    )
    streams, new_params = [], dict(new["params"])
    embed = jax.jit(lambda v, x: before.apply(v, x, method=_first_stream), out_shardings=None)
    embedding = jax.device_put(before_variables, whole)
    for batch in padded_batches(images, batch_size, mesh):
        x = embed(embedding, batch["image"])
        streams.append((x, x, batch["mask"]))

    missed = {}
    for i in range(after.depth):
        name = f"blocks_{i}"
        old_layer, new_layer = (jax.device_put(_layer(v, name), whole) for v in (old, new))
        sums, passed = _Sums("bias" in new["params"][name]["attn"]["out"]), []
        for x, y, mask in streams:
            out, found = observe(old_layer, new_layer, x, y, mask)
            sums.add(**jax.device_get(found))
            passed.append(out)
        projection = new["params"][name]["attn"]["out"]
        scale = np.asarray(new["params"][name].get("ls1", 1.0), np.float64)
        folded = _with_scale(projection, scale)
        solved = sums.solve(folded, strength)
        missed[name] = (sums.missed(folded), sums.missed(solved))
        solved = {f"{name}/attn/out": _without_scale(solved, scale, projection)}
        (refitted,) = layers.cast(solved, projection["kernel"].dtype).values()
        attention = {**new["params"][name]["attn"], "out": refitted}
        new_params[name] = {**new["params"][name], "attn": attention}
        new_layer = jax.device_put({**_layer(new, name), "params": new_params[name]}, whole)
        streams = [
            (out, go_on(new_layer, y, mask), mask)
            for out, (_, y, mask) in zip(passed, streams, strict=True)
        ]
    stacked = "blocks" in variables["params"]
    return layers.stack_layers(new_params) if stacked else new_params, missed


def _first_stream(model: vit.VisionTransformer, images: Array) -> Array:
    """The tokens BTD that the first block gets."""
    x = model.embed(images)
    return x if model.norm_pre is None else model.norm_pre(x)


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
    wanted = FOLLOWED[before.block.block].wanted
    exact = {"precision": jax.lax.Precision.HIGHEST}

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
        heads = heads.reshape(*heads.shape[:2], -1)
        projection = variables["params"]["attn"]["out"]
        kernel = projection["kernel"].reshape(-1, x.shape[-1])
        attention = jnp.matmul(heads, kernel, **exact) + projection.get("bias", 0.0)
        return heads, _Seen(x, attention * variables["params"].get("ls1", 1.0), out)

    @sharding.jit_for(mesh, out_shardings=(split, sharding.replicated(mesh)))
    def observe(old: Variables, new: Variables, x: Array, y: Array, mask: Array):
        _, theirs = run(before, old, x, mask)
        inputs, ours = run(after, new, y, mask)
        target = wanted(theirs, ours).astype(jnp.float32)
        parts = [jnp.where(mask[:, None, None], a, 0.0) for a in (inputs, target)]
        tokens = jnp.sum(mask) * x.shape[1]
        means = [jnp.sum(a, axis=(0, 1)) / jnp.maximum(tokens, 1) for a in parts]
        a, b = (
            jnp.where(mask[:, None, None], part - mean, 0.0)
            for part, mean in zip(parts, means, strict=True)
        )
        return theirs.out, {
            "tokens": tokens,
            "input_mean": means[0],
            "target_mean": means[1],
            "inputs": jnp.einsum("BTI,BTJ->IJ", a, a, **exact),
            "cross": jnp.einsum("BTI,BTD->ID", a, b, **exact),
            "target": jnp.sum(jnp.square(b), axis=(0, 1)),
        }

    @sharding.jit_for(mesh, out_shardings=split)
    def go_on(variables: Variables, x: Array, mask: Array):
        return run(after, variables, x, mask)[1].out

    return observe, go_on


class _Sums:
    """Batches' sums added up in float64: a the heads' outputs, y what attention should give.

    Moments are about the means where a bias can hold them, else about zero.
    """

    def __init__(self, has_bias: bool):
        self._tokens, self._sums, self._has_bias = 0.0, None, has_bias

    def add(self, tokens: Any, input_mean: Any, target_mean: Any, **centred: Any) -> None:
        n = float(tokens)
        a, y = np.asarray(input_mean, np.float64), np.asarray(target_mean, np.float64)
        products = {"inputs": np.outer(a, a), "cross": np.outer(a, y), "target": y * y}
        sums = {name: centred[name] + n * product for name, product in products.items()}
        about = n if self._has_bias else 0.0
        sums |= {"input_mean": about * a, "target_mean": about * y}
        before = self._sums or dict.fromkeys(sums, 0.0)
        self._sums = {name: before[name] + x for name, x in sums.items()}
        self._tokens += n

    def _mean(self, name: str) -> np.ndarray:
        return self._sums[name] / self._tokens

    def solve(self, projection: dict[str, np.ndarray], strength: float) -> dict[str, np.ndarray]:
        names = ("inputs", "cross", "input_mean", "target_mean")
        moments = (self._mean(name) for name in names)
        kernel, bias = refit_output(
            projection["kernel"], projection.get("bias"), *moments, strength
        )
        return {"kernel": kernel} | ({} if bias is None else {"bias": bias})

    def missed(self, projection: dict[str, np.ndarray]) -> float:
        """E|y - W^T a - b|^2 as a share of the variance of y."""
        a, y = self._mean("input_mean"), self._mean("target_mean")
        kernel = projection["kernel"].reshape(len(a), -1)
        covariance = self._mean("inputs") - np.outer(a, a)
        cross = self._mean("cross") - np.outer(a, y)
        variance = float(np.sum(self._mean("target") - y * y))
        offset = y - a @ kernel - projection.get("bias", 0.0)
        error = np.sum(kernel * (covariance @ kernel - 2.0 * cross)) + np.sum(offset**2)
        return float(max(variance + error, 0.0) / variance) if variance > 0.0 else 0.0
