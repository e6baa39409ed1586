"""Refitting output projections after key/value heads were pooled or merged.

Layer after layer, from the first to the last: with the inputs that the converted model itself has
there, W_o and b_o are solved for so that the residual stream after attention is that of the
original model; `FOLLOWED` says what that means in each order of a block's parts. LayerScale is part
of the projection that is solved for (ridge.py), and how near the solution stays to the present
weights is decided for every layer by images that it did not see. Activations of both models are
kept, so that all layers together cost about one forward pass of the original and two of the
converted model.

    B  batch    T  tokens    D  model width    N  query heads    H  width of one head
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import sharding, tree_utils, vit
from kdgqa_jax.block import Block
from kdgqa_jax.heads.calibration import padded_batches
from kdgqa_jax.heads.ridge import EVERY, Refit, Sums, solve

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
    strength: float | None = None,
) -> tuple[dict[str, Any], dict[str, Refit]]:
    """Output projections with which a converted model follows the original one.

    Args:
      before: the original model, any variant.
      before_variables: {"params": ...} and, for DGQA, "norm_stats", layers stacked or not.
      after: the converted model; it differs from `before` in its attention alone.
      variables: its variables.
      images: (n, height, width, channels) float32, normalised.
      batch_size: images at a time, as for `calibration.gather_moments`.
      mesh: of the devices; None: all of them.
      strength: of the ridge, see `ridge.refit_output`; None: for every layer the one in
        `ridge.STRENGTHS` that misses least on images held out, every fifth, while the others solve;
        `ridge.UNTRIED` where there are fewer than five.

    Returns:
      The converted model's params, layers as they were, with new `out` kernels (N,V,D) and biases
      (D,), where there are any, of the old dtypes; and what came of it by layer name ("blocks_0",
      ...).

    Raises:
      UserError: no images, images of another size than the models', or numbers too large for the
        dtype of the projection.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    observe, go_on = _make_steps(before, after, mesh)
    whole = sharding.replicated(mesh)
    old, new = (
        {name: tree_utils.unstack_layers(tree) for name, tree in v.items()}
        for v in (before_variables, variables)
    )
    streams, new_params = [], dict(new["params"])
    embed = jax.jit(lambda v, x: before.apply(v, x, method=_first_stream), out_shardings=None)
    embedding = jax.device_put(before_variables, whole)
    tries = strength is None and len(images) >= EVERY
    position = 0
    for batch in padded_batches(images, batch_size, mesh):
        x = embed(embedding, batch["image"])
        positions = position + np.arange(len(batch["mask"]))
        position = int(positions[-1]) + 1
        held = np.asarray(batch["mask"]) & tries & (positions % EVERY == EVERY - 1)
        parts = sharding.put_batch({"seen": np.asarray(batch["mask"]) & ~held, "held": held}, mesh)
        streams.append((x, x, {**parts, "mask": batch["mask"]}))

    refits = {}
    for i in range(after.depth):
        name = f"blocks_{i}"
        old_layer, new_layer = (jax.device_put(_layer(v, name), whole) for v in (old, new))
        projection = new["params"][name]["attn"]["out"]
        sums = {part: Sums("bias" in projection) for part in ("seen", "held")}
        passed = []
        for x, y, masks in streams:
            out, found = observe(old_layer, new_layer, x, y, masks)
            for part, added in jax.device_get(found).items():
                sums[part].add(**added)
            passed.append(out)
        scale = np.asarray(new["params"][name].get("ls1", 1.0), np.float64)
        solved, refits[name] = solve(_with_scale(projection, scale), **sums, strength=strength)
        solved = {f"{name}/attn/out": _without_scale(solved, scale, projection)}
        (refitted,) = tree_utils.cast(solved, projection["kernel"].dtype).values()
        attention = {**new["params"][name]["attn"], "out": refitted}
        new_params[name] = {**new["params"][name], "attn": attention}
        new_layer = jax.device_put({**_layer(new, name), "params": new_params[name]}, whole)
        streams = [
            (out, go_on(new_layer, y, masks["mask"]), masks)
            for out, (_, y, masks) in zip(passed, streams, strict=True)
        ]
    stacked = "blocks" in variables["params"]
    return tree_utils.stack_layers(new_params) if stacked else new_params, refits


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

    observe: (old layer, new layer, their inputs BTD, masks (B,) "mask" and of its parts "seen" and
    "held") -> (output of the old layer BTD, sums of both parts of a batch). go_on: (layer, input,
    mask) -> output of the new layer.
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
    def observe(old: Variables, new: Variables, x: Array, y: Array, masks: dict[str, Array]):
        _, theirs = run(before, old, x, masks["mask"])
        inputs, ours = run(after, new, y, masks["mask"])
        target = wanted(theirs, ours).astype(jnp.float32)
        return theirs.out, {name: sums(inputs, target, masks[name]) for name in ("seen", "held")}

    def sums(inputs: Array, target: Array, mask: Array) -> dict[str, Array]:
        parts = [jnp.where(mask[:, None, None], a, 0.0) for a in (inputs, target)]
        tokens = jnp.sum(mask) * inputs.shape[1]
        means = [jnp.sum(a, axis=(0, 1)) / jnp.maximum(tokens, 1) for a in parts]
        a, b = (
            jnp.where(mask[:, None, None], part - mean, 0.0)
            for part, mean in zip(parts, means, strict=True)
        )
        return {
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
