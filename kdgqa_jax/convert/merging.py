"""Merging key/value heads so that every query head still computes almost what it computed.

The heads of a group are mapped into one shared head, and the query and output projections are
adapted to it: same architecture and shapes as pooling gives. All maps are linear and fold into the
weights. numpy and float64 throughout; nothing here depends on a model, so the same functions serve
any self-attention with biases or without (ViT, BERT).

    D  model width    N  query heads    H  width of one head
    J  key/value heads that there are   K  key/value heads wanted
    G  heads of a group (J/K), each of which serves N/J query heads

A rule of `MERGING` gives, for each head of a group, an encoder E[g] and a decoder R[g] (H, H each):

    shared head = sum_g E[g]^T k[g]        k[g] is read back as R[g] (shared head)

Queries become R^T q and output rows R^T W_o. `svd` (after arXiv 2406.07056) takes the E and R with
the least expected squared error of the logits, queries and keys taken as independent, and of each
head's contribution to the output; the error is what the discarded eigenvalues sum up to.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdgqa_jax.convert.moments import InputMoments, data_free_moments
from kdgqa_jax.convert.pooling import check_groups
from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.layers import stack_layers, unstack_layers

Attention = Mapping[str, Mapping[str, Any]]
"""One layer: "query" (D,N,H), "key" and "value" (D,J,H), "out" (N,H,D), each {"kernel", "bias"}.

Biases (N,H), (J,H), (J,H), (D,); those of query, key and value may be missing.
"""

FLOOR = 1e-6  # least eigenvalue under a square root, as a share of the largest one
RIDGE = 1e-6  # isotropic part added to the moments, as a share of the mean eigenvalue of E[x x^T]
# Moments summed in float32 are known to about that. The floor bounds how much a direction that
# queries or outputs hardly use is blown up; the ridge has the weights decide about directions that
# calibration never showed, where rounding errors would.


# --- the rules ----------------------------------------------------------------------------------


def _symmetric_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root and its inverse of (..., H, H) positive semidefinite; of zero: zero and zero."""
    values, vectors = np.linalg.eigh(x)
    roots = np.sqrt(np.maximum(values, FLOOR * np.maximum(values[..., -1:], 0.0)))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0.0)

    def back(diagonal: np.ndarray) -> np.ndarray:
        return (vectors * diagonal[..., None, :]) @ vectors.swapaxes(-1, -2)

    return back(roots), back(inverses)


def _svd(moment: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eckart-Young: the top H eigenvectors of the moment in the metric of the weights."""
    group, width = moment.shape[:2]
    root, inverse = _symmetric_root(weight)
    weighted = np.einsum("gab,gbhc,hcd->gahd", root, moment, root, optimize=True)
    weighted = weighted.reshape(group * width, group * width)
    vectors = np.linalg.eigh((weighted + weighted.T) / 2)[1][:, ::-1][:, :width]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    vectors = vectors * np.where(largest < 0.0, -1.0, 1.0)  # LAPACK leaves the signs open
    vectors = vectors.reshape(group, width, width)
    return root @ vectors, inverse @ vectors


def _procrustes(moment: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate every head onto the sum of the others, in turns, until nothing gains; then pool.

    It starts by rotating all heads onto the one with the most energy, and each turn raises the sum
    of products between the heads, so that it ends, and always in the same place.
    """
    group, width = moment.shape[:2]
    reference = int(np.argmax(np.einsum("gaga->g", moment)))
    blocks = moment.transpose(0, 2, 1, 3)  # g, h, (H, H)

    def rotation(product: np.ndarray) -> tuple[np.ndarray, float]:
        left, gain, right = np.linalg.svd(product)
        return left @ right, float(gain.sum())

    rotations = np.stack([rotation(blocks[g, reference])[0] for g in range(group)])
    rotations[reference] = np.eye(width)
    before = -np.inf
    for _ in range(200):
        gain = 0.0
        for g in range(group):
            products = blocks[g] @ rotations
            rotations[g], more = rotation(products.sum(axis=0) - products[g])
            gain += more
        if gain <= before * (1.0 + 1e-9):
            break
        before = gain
    return rotations / group, rotations


MERGING: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "svd": _svd,
    "procrustes": _procrustes,
}
"""How the heads of a group are merged: moment and weight -> encoders and decoders (G, H, H).

The moment (G, H, G, H) is E[k[g] k[h]^T] of the centred heads; weight[g] (H, H) is what an error of
head g costs: E[q q^T] of its queries, or W_o W_o^T of its output rows.
"""


# --- one layer ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Merged:
    """A layer with merged heads, and what that cost, by group.

    Energies are expected squares, summed over the query heads of a group: of logits, without what
    is equal in a row and before the division by sqrt H; and of what one token's value adds to the
    output of the layer, its mean left out.
    """

    attention: dict[str, dict[str, np.ndarray]]  # as `Attention`, with K key/value heads; float64
    key_energy: np.ndarray  # (K,)
    key_lost: np.ndarray  # (K,) the expected squared error
    value_energy: np.ndarray  # (K,)
    value_lost: np.ndarray  # (K,)

    @property
    def keys_kept(self) -> np.ndarray:
        """(K,) share of the energy of logits that is kept; 1 where there is none."""
        return _share_kept(self.key_energy, self.key_lost)

    @property
    def values_kept(self) -> np.ndarray:
        """(K,) share of the energy of values that is kept; 1 where there is none."""
        return _share_kept(self.value_energy, self.value_lost)


def merge_heads(
    attention: Attention, num_kv_heads: int, moments: InputMoments, rule: str = "svd"
) -> Merged:
    """Merge the key/value heads of one attention layer.

    The weight (out, in) of a linear layer of PyTorch is `weight.T.reshape(D, N, H)` here, that of
    the output projection `weight.T.reshape(N, H, D)`.

    Args:
      attention: arrays of the layer, see `Attention`; J key/value heads, of which head j serves the
        query heads j*N/J .. (j+1)*N/J - 1.
      num_kv_heads: K; divides J. K == J changes nothing.
      moments: of the layer's input.
      rule: a name in `MERGING`.

    Returns:
      The merged layer in float64, balanced as `balance_heads` does, and the energies.

    Raises:
      UserError: K does not divide J, an unknown rule, moments that are empty, of another width or
        not finite.
    """
    if rule not in MERGING:
        raise unknown("merging rule", rule, MERGING)
    layer = {
        name: {leaf: np.asarray(x, np.float64) for leaf, x in projection.items()}
        for name, projection in attention.items()
    }
    model_width, num_heads, width = layer["query"]["kernel"].shape
    have = layer["key"]["kernel"].shape[1]
    check_groups(have, num_kv_heads)
    _check_moments(moments, model_width)
    seen = _seen(layer, moments)
    keys, values = _problems(layer, moments, seen)
    key_energy, value_energy = (p.energy(num_kv_heads) for p in (keys, values))
    if have == num_kv_heads:
        return Merged(layer, key_energy, np.zeros(have), value_energy, np.zeros(have))

    ridge = RIDGE * (np.trace(moments.second) / model_width or 1.0)
    ridged = {name: x + ridge * layer[name]["kernel"] for name, x in seen.items()}
    key_maps, value_maps = (p.solve(num_kv_heads, rule) for p in _problems(layer, moments, ridged))

    def encoded(projection: Mapping[str, np.ndarray], encoders: np.ndarray) -> dict[str, Any]:
        by_group = (num_kv_heads, have // num_kv_heads, width)
        return {
            leaf: np.einsum("...jh,jhe->...je", x, encoders)
            .reshape(*x.shape[:-2], *by_group)
            .sum(axis=-2)
            for leaf, x in projection.items()
        }

    # Queries and output rows take the decoder of the key/value head that served them: (N, H, H).
    key_back, value_back = (np.repeat(m[1], num_heads // have, 0) for m in (key_maps, value_maps))
    queries = layer["query"].items()
    merged = {
        "query": {leaf: np.einsum("...nh,nhe->...ne", x, key_back) for leaf, x in queries},
        "key": encoded(layer["key"], key_maps[0]),
        "value": encoded(layer["value"], value_maps[0]),
    }
    mean, shared_mean = (
        np.repeat(_head_means(x["value"], moments), repeats, axis=0)  # (N, H)
        for x, repeats in ((layer, num_heads // have), (merged, num_heads // num_kv_heads))
    )
    missing = mean - np.einsum("nhe,ne->nh", value_back, shared_mean)
    rows = layer["out"]["kernel"]
    merged["out"] = {
        "kernel": np.einsum("nhe,nhd->ned", value_back, rows),
        "bias": layer["out"]["bias"] + np.einsum("nh,nhd->d", missing, rows),
    }
    return Merged(
        balance_heads(merged),
        key_energy,
        keys.lost(num_kv_heads, *key_maps),
        value_energy,
        values.lost(num_kv_heads, *value_maps),
    )


def balance_heads(attention: Attention) -> dict[str, dict[str, np.ndarray]]:
    """Give every dimension of a shared head the same scale on both sides; the function stays.

    Afterwards the norm of its column in the key kernel is the root mean square of those in the
    kernels of the query heads that it serves, and so for value and output. Weight decay and updates
    of one size for all weights, as Adam makes, then meet what they meet in an ordinary model.
    Dimensions that are dead on either side stay as they are.
    """
    layer = {name: dict(projection) for name, projection in attention.items()}
    num_heads, num_kv_heads = layer["query"]["kernel"].shape[1], layer["key"]["kernel"].shape[1]
    group = num_heads // num_kv_heads

    def scales(one: np.ndarray, many: np.ndarray) -> np.ndarray:
        """Squared norms (K, H) and (N, H) -> factors (K, H) on the one side."""
        mean = many.reshape(num_kv_heads, group, -1).mean(axis=1)
        alive = np.minimum(one / (one.max() or 1.0), mean / (mean.max() or 1.0)) > 1e-14
        ratio = np.divide(mean, one, out=np.ones_like(one), where=alive)
        return ratio**0.25

    def squares(name: str, axis: int) -> np.ndarray:
        return np.sum(np.square(layer[name]["kernel"]), axis=axis)

    factor = scales(squares("key", 0), squares("query", 0))
    layer["key"] = {leaf: x * factor for leaf, x in layer["key"].items()}
    back = np.repeat(factor, group, axis=0)
    layer["query"] = {leaf: x / back for leaf, x in layer["query"].items()}
    factor = scales(squares("value", 0), squares("out", 2))
    layer["value"] = {leaf: x * factor for leaf, x in layer["value"].items()}
    back = np.repeat(factor, group, axis=0)
    layer["out"]["kernel"] = layer["out"]["kernel"] / back[..., None]
    return layer


@dataclasses.dataclass
class _Problem:
    """What to merge: heads whose moment is kernel^T seen, with weight (J, H, H) as in `MERGING`.

    Attributes:
      kernel: (D, J, H) of the heads.
      seen: (D, J, H) the moment of the layer's input times the kernel.
      weight: (J, H, H).
    """

    kernel: np.ndarray
    seen: np.ndarray
    weight: np.ndarray

    def groups(self, num_kv_heads: int, *more: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """(moment, weight, *more) of each group."""
        group = len(self.weight) // num_kv_heads
        parts = [slice(i * group, (i + 1) * group) for i in range(num_kv_heads)]
        return [
            (
                np.tensordot(self.kernel[:, p], self.seen[:, p], (0, 0)),
                *(x[p] for x in (self.weight, *more)),
            )
            for p in parts
        ]

    def solve(self, num_kv_heads: int, rule: str) -> tuple[np.ndarray, np.ndarray]:
        """Encoders and decoders of all heads, (J, H, H) each."""
        maps = [MERGING[rule](*group) for group in self.groups(num_kv_heads)]
        encoders, decoders = zip(*maps, strict=True)
        return np.concatenate(encoders), np.concatenate(decoders)

    def energy(self, num_kv_heads: int) -> np.ndarray:
        """(K,)."""
        return np.array([_energy(*group) for group in self.groups(num_kv_heads)])

    def lost(self, num_kv_heads: int, encoders: np.ndarray, decoders: np.ndarray) -> np.ndarray:
        """(K,) energy of what reading the shared head back does not give."""
        lost = []
        for moment, weight, encoder, decoder in self.groups(num_kv_heads, encoders, decoders):
            group, width = moment.shape[:2]
            size = group * width
            error = np.eye(size) - decoder.reshape(size, width) @ encoder.reshape(size, width).T
            moment = error @ moment.reshape(size, size) @ error.T
            lost.append(_energy(moment.reshape(group, width, group, width), weight))
        return np.array(lost)


def _energy(moment: np.ndarray, weight: np.ndarray) -> float:
    return float(np.einsum("gagb,gba->", moment, weight))


def _share_kept(energy: np.ndarray, lost: np.ndarray) -> np.ndarray:
    return 1.0 - np.divide(lost, energy, out=np.zeros_like(lost), where=energy > 0.0)


def _seen(layer: Attention, moments: InputMoments) -> dict[str, np.ndarray]:
    """The moment that counts for each kernel times that kernel, of the kernel's shape."""
    by = {"query": moments.covariance, "key": moments.centred, "value": moments.covariance}
    return {name: np.tensordot(moment, layer[name]["kernel"], 1) for name, moment in by.items()}


def _problems(
    layer: Attention, moments: InputMoments, seen: Mapping[str, np.ndarray]
) -> tuple[_Problem, _Problem]:
    """Of keys and of values; `seen` as `_seen` gives it."""
    query, key, value = (layer[name]["kernel"] for name in ("query", "key", "value"))
    rows, have = layer["out"]["kernel"], key.shape[1]

    # Key heads and value heads pay for all query heads that they serve.
    means = _head_means(layer["query"], moments)
    spread = query.transpose(1, 2, 0) @ seen["query"].swapaxes(0, 1)
    query_weight = spread + means[:, :, None] * means[:, None, :]
    key_weight, value_weight = (
        x.reshape(have, -1, *x.shape[1:]).sum(axis=1)
        for x in (query_weight, rows @ rows.swapaxes(1, 2))
    )
    return _Problem(key, seen["key"], key_weight), _Problem(value, seen["value"], value_weight)


def _head_means(projection: Mapping[str, np.ndarray], moments: InputMoments) -> np.ndarray:
    """E of a projection, (heads, H)."""
    return np.tensordot(moments.mean, projection["kernel"], 1) + projection.get("bias", 0.0)


def _check_moments(moments: InputMoments, width: int) -> None:
    if moments.tokens <= 0:
        raise UserError("the moments to merge heads by hold no tokens; give calibration images")
    if moments.total.shape != (width,):
        raise UserError(
            f"moments of {len(moments.total)} features do not fit a layer of width {width}"
        )
    if not all(np.isfinite(x).all() for x in (moments.total, moments.within, moments.between)):
        raise UserError("the moments to merge heads by hold NaN or infinity; check the images")


# --- all layers of a ViT ------------------------------------------------------------------------


def one_per_query_head(params: dict[str, Any], allocations: Sequence[np.ndarray]) -> dict[str, Any]:
    """Parameters with each key/value head once for every query head that it serves.

    The equal groups that merging goes by are then those of the model, whatever its allocation.

    Args:
      params: of `vit.VisionTransformer` with K key/value heads, layers stacked or not.
      allocations: of every layer, (K,) int.

    Returns:
      `params` with N key/value heads.
    """
    if "blocks" in params:
        return stack_layers(one_per_query_head(unstack_layers(params), allocations))
    params = dict(params)
    for i, allocation in enumerate(allocations):
        block = params[f"blocks_{i}"]
        repeated = {
            projection: {
                leaf: np.repeat(np.asarray(x), allocation, axis=-2)
                for leaf, x in block["attn"][projection].items()
            }
            for projection in ("key", "value")
        }
        params[f"blocks_{i}"] = {**block, "attn": {**block["attn"], **repeated}}
    return params


def to_merged(
    params: dict[str, Any],
    num_kv_heads: int,
    moments: Mapping[str, InputMoments] | None = None,
    rule: str = "svd",
) -> tuple[dict[str, Any], dict[str, Merged]]:
    """Parameters of a ViT with K key/value heads from those of one with more.

    Args:
      params: of `vit.VisionTransformer`, layers stacked or not.
      num_kv_heads: K; divides the number of key/value heads in `params`.
      moments: of the input of every layer by name ("blocks_0", ...), as
        `calibration.gather_moments` gives them; None: `data_free_moments` of its norm.
      rule: a name in `MERGING`.

    Returns:
      `params` with key and value kernels (..., D, K, H) and biases (..., K, H), queries and output
      adapted, dtypes kept; and what merging made of each layer, by name, in those dtypes.

    Raises:
      UserError: as `merge_heads`.
    """
    if "blocks" in params:
        converted, merged = to_merged(unstack_layers(params), num_kv_heads, moments, rule)
        return stack_layers(converted), merged
    converted, merged = dict(params), {}
    for name in (name for name in params if name.startswith("blocks_")):
        old, norm = params[name]["attn"], params[name]["norm1"]
        if moments is None:
            of_layer = data_free_moments(norm["scale"], norm["bias"])
        else:
            of_layer = moments[name]
        merged[name] = merge_heads(old, num_kv_heads, of_layer, rule)
        attention = {
            projection: {leaf: x.astype(old[projection][leaf].dtype) for leaf, x in leaves.items()}
            for projection, leaves in merged[name].attention.items()
        }
        merged[name] = dataclasses.replace(merged[name], attention=attention)
        converted[name] = {**params[name], "attn": {**old, **attention}}
    return converted, merged
