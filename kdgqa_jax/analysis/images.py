"""The heads of a model over many images: similarity, PGQA's noise, key norms, allocations."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import tree_utils, vit
from kdgqa_jax.analysis.capturing import capture
from kdgqa_jax.analysis.heads import perturbed, self_similarity, similarity
from kdgqa_jax.errors import UserError
from kdgqa_jax.noise import Noise

Array = jax.Array

KINDS = ("maps", "outputs")
"""What heads are compared by."""

NOISE_SCALES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


@flax.struct.dataclass
class Analysis:
    """What was found over n images; P noise scales, L layers, N query, K key/value heads.

    Dicts are by `KINDS`. Similarities are means over the images.
    """

    noise_scales: tuple[float, ...]  # the first one is 0
    cosine: dict[str, np.ndarray]  # (P, L, N, N) float32
    within: dict[str, np.ndarray]  # (P, L) float32, NaN where there is no such pair
    between: dict[str, np.ndarray]  # (P, L) float32
    self: dict[str, np.ndarray]  # (P, L, N) float32: of each head with itself at scale 0
    key_norms: np.ndarray  # (n, L, K) float32
    allocations: np.ndarray  # (batches, L, K) int32, or (n, L, K) in example scope

    @property
    def idle(self) -> np.ndarray:
        """(L, K) float64: the share of batches (or images) where a head serves no query head."""
        return np.mean(self.allocations == 0, axis=0)

    def to_json(self) -> dict[str, Any]:
        """JSON values; None for NaN. Norms of images are summed up by layer and head."""
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        quantiles = np.quantile(self.key_norms, shares, axis=0)
        return {
            "image_count": len(self.key_norms),
            "noise_scales": list(self.noise_scales),
            "similarity": {
                kind: {
                    "within": _plain(self.within[kind]),
                    "between": _plain(self.between[kind]),
                    "self": _plain(self.self[kind].mean(-1)),
                    "cosine": _plain(self.cosine[kind][0]),
                }
                for kind in KINDS
            },
            "key_norm": {
                "mean": _plain(self.key_norms.mean(0)),
                "deviation": _plain(self.key_norms.std(0)),
                "quantiles": {str(q): _plain(x) for q, x in zip(shares, quantiles, strict=True)},
            },
            "allocation": {"mean": _plain(self.allocations.mean(0)), "idle": _plain(self.idle)},
        }


def _plain(values: np.ndarray) -> Any:
    if np.ndim(values):
        return [_plain(x) for x in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: vit.VisionTransformer,
    noise: Noise,
    variables: dict[str, Any],
    images: Array,
    mask: Array,
    scales: Array,
    rng: Array,
) -> tuple[Any, Array, Array]:
    """(pairs of sums over real images and their number by kind and name, key norms (L, B, K),
    allocations)."""
    seen = capture(model, variables, images, mask)
    index = seen.group_index  # (L, N) or (L, B, N)
    by_image = index if index.ndim == 3 else index[:, None]
    rngs = jax.random.split(rng, len(index))

    def summed(values: Array) -> tuple[Array, Array]:
        counted = mask.reshape(-1, *[1] * (values.ndim - 1)) & ~jnp.isnan(values)
        return jnp.sum(jnp.where(counted, values, 0.0), axis=0), jnp.sum(counted, axis=0)

    def of_layer(scale: Array, layer: tuple[Array, ...]) -> Any:
        maps, outputs, values, group_index, groups, key = layer
        noisy_maps, noisy_outputs = perturbed(key, maps, values, group_index, noise, scale)
        pairs = {
            "maps": (maps, noisy_maps),
            "outputs": (jnp.swapaxes(outputs, 1, 2), jnp.swapaxes(noisy_outputs, 1, 2)),
        }
        found = {}
        for kind, (before, after) in pairs.items():
            alike = similarity(after, groups)
            found[kind] = {
                "cosine": summed(alike.cosine),
                "within": summed(alike.within),
                "between": summed(alike.between),
                "self": summed(self_similarity(before, after)),
            }
        return found

    by_layer = (seen.maps, seen.outputs, seen.values, index, by_image, rngs)
    # One after the other: maps are large.
    sums = jax.lax.map(lambda s: jax.lax.map(functools.partial(of_layer, s), by_layer), scales)
    return sums, seen.image_norms, seen.allocation


def analyse(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    images: np.ndarray,
    noise_scales: Sequence[float] = NOISE_SCALES,
    batch_size: int = 32,
    seed: int = 0,
) -> Analysis:
    """Similarity of heads over noise scales, key norms and allocations, in evaluation.

    The noise is that of the model, or PGQA's default where it has none. It is drawn for each layer
    by itself, with the layers before undisturbed. In batch scope the groups of `kdgqa` depend on
    the images of a batch.

    Args:
      model: any variant.
      variables: {"params": ..., and for DGQA "norm_stats": ...}.
      images: (n, height, width, channels) float32, normalised; n at least 1.
      noise_scales: factors on the noise; 0 comes first, whether it is among them or not.
      batch_size: images at a time; smaller batches are padded and masked.
      seed: of the noise.

    Raises:
      UserError: no images, or scales that are none.
    """
    if not len(images):
        raise UserError("there are no images to analyse: the array is empty")
    if not all(np.isfinite(s) and s >= 0 for s in noise_scales):
        raise UserError(f"noise scales {tuple(noise_scales)} must be finite and not negative")
    scales = (0.0, *sorted({float(s) for s in noise_scales} - {0.0}))
    noise = model.attention.noise or Noise()
    clean = model.clone(attention=dataclasses.replace(model.attention, noise=None))
    size = min(batch_size, len(images))
    rng = jax.random.key(seed)
    totals, norms, allocations = None, [], []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        count = len(batch)
        padded = np.pad(batch, [(0, size - count)] + [(0, 0)] * (batch.ndim - 1))
        mask = np.arange(size) < count
        sums, image_norms, allocation = jax.device_get(
            _step(clean, noise, variables, padded, mask, np.float32(scales), rng)
        )
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        norms.append(image_norms[:, :count])
        allocations += tree_utils.allocations_by_batch(allocation, count)

    def mean(kind: str, name: str) -> np.ndarray:
        total, count = totals[kind][name]
        return total / np.where(count == 0, np.nan, count).astype(np.float32)

    found = {name: {kind: mean(kind, name) for kind in KINDS} for name in _NAMES}
    key_norms = np.moveaxis(np.concatenate(norms, axis=1), 1, 0)
    return Analysis(scales, **found, key_norms=key_norms, allocations=np.stack(allocations))


_NAMES = ("cosine", "within", "between", "self")


def analyse_directory(
    directory: str | os.PathLike,
    place: str,
    data_dir: str = "",
    count: int = 256,
    noise_scales: Sequence[float] = NOISE_SCALES,
    batch_size: int = 32,
    seed: int = 0,
) -> tuple[Analysis, vit.VisionTransformer, np.ndarray]:
    """`analyse` of a model directory on images of a data set or a folder.

    Args:
      directory: a model directory.
      place: a data set (its training images) or a folder of image files.
      data_dir: where the files of the data set are.
      count: how many images, chosen by the seed; all, where there are no more.
      noise_scales: as `analyse` takes them; batch_size and seed as well.

    Returns:
      (what was found, the model, group indices (L, N) of most batches).

    Raises:
      UserError: no model there, no such images, or what `analyse` raises.
    """
    from kdgqa_jax import allocation, checkpoint
    from kdgqa_jax.convert import CalibrationImages
    from kdgqa_jax.data.images import Preprocessing

    model, variables, description = checkpoint.load_model(directory)
    preprocessing = Preprocessing(**description["preprocessing"])
    chosen = CalibrationImages(place, data_dir, count, seed)
    images = chosen.read(model.image_shape, description["channels"], preprocessing)
    found = analyse(model, variables, images, noise_scales, batch_size, seed)
    most = [rows[0] for rows in tree_utils.allocations_by_frequency([*found.allocations])]
    groups = [allocation.group_index(a, model.attention.num_heads) for a in most]
    return found, model, np.stack(groups)
