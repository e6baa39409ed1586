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

A norm between the two sides of a product lets no map through: see `NOT_LINEAR`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.heads.merging_rules import MERGING
from kdgqa_jax.heads.moments import InputMoments
from kdgqa_jax.heads.pooling import check_groups

Attention = Mapping[str, Mapping[str, Any]]
"""One layer: "query" (D,N,H), "key" and "value" (D,J,H), "out" (N,H,D), each {"kernel", "bias"}.

Biases (N,H), (J,H), (J,H), (D,); any may be missing. "q_norm", "k_norm" and "norm" are there where
the layer has those norms; they stay as they are.
"""

NOT_LINEAR = {"key": ("q_norm", "qk_norm"), "value": ("norm", "scale_attn_norm")}
"""By projection: the norm of `Attention` that lets no map through to the other side, and the option
of models that it comes with. Heads of such a projection are averaged, whatever the rule."""

RIDGE = 1e-6  # isotropic part added to the moments, as a share of the mean eigenvalue of E[x x^T]
# It has the weights decide about directions that calibration never showed, where rounding errors
# of moments summed in float32 would.


# --- one layer ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Merged:
    """A layer with merged heads, and what that cost, by group.

    Energies are expected squares, summed over the query heads of a group: of logits, without what
    is equal in a row and before the division by sqrt H; and of what one token's value adds to the
    output of the layer, after LayerScale, its mean left out where the output has a bias to hold it.
    Those of a projection in `NOT_LINEAR` are None, and so is their share.
    """

    attention: dict[str, dict[str, np.ndarray]]  # as `Attention`, with K key/value heads; float64
    key_energy: np.ndarray | None  # (K,)
    key_lost: np.ndarray | None  # (K,) the expected squared error
    value_energy: np.ndarray | None  # (K,)
    value_lost: np.ndarray | None  # (K,)

    @property
    def keys_kept(self) -> np.ndarray | None:
        """(K,) share of the energy of logits that is kept; 1 where there is none."""
        return _share_kept(self.key_energy, self.key_lost)

    @property
    def values_kept(self) -> np.ndarray | None:
        """(K,) share of the energy of values that is kept; 1 where there is none."""
        return _share_kept(self.value_energy, self.value_lost)


def not_linear(attention: Attention) -> dict[str, str]:
    """The projections of a layer that are averaged, whatever the rule, and the options why."""
    return {name: option for name, (norm, option) in NOT_LINEAR.items() if norm in attention}


def merge_heads(
    attention: Attention,
    num_kv_heads: int,
    moments: InputMoments,
    rule: str = "svd",
    layer_scale: np.ndarray | None = None,
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
      layer_scale: (D,) factors on what the output projection gives: they say what an error there
        costs. None: ones.

    Returns:
      The merged layer in float64, balanced as `balance_heads` does, and the energies.

    Raises:
      UserError: K does not divide J, an unknown rule, moments that are empty, of another width or
        not finite, a layer of which nothing is linear.
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
    averaged = not_linear(layer)
    seen = _seen(layer, moments)
    problems = _problems(layer, moments, seen, layer_scale)
    energy = {n: None if n in averaged else p.energy(num_kv_heads) for n, p in problems.items()}
    if have == num_kv_heads:
        lost = {name: None if name in averaged else np.zeros(have) for name in problems}
        return Merged(layer, energy["key"], lost["key"], energy["value"], lost["value"])
    if len(averaged) == len(problems):
        raise UserError(
            f"{rule} has nothing to merge in layers with {' and '.join(averaged.values())}, whose"
            " norms let no linear map through; pool the heads: pooling 'mean'"
        )

    ridge = RIDGE * (np.trace(moments.second) / model_width or 1.0)
    ridged = {name: x + ridge * layer[name]["kernel"] for name, x in seen.items()}
    maps = {
        name: _mean(have, num_kv_heads, width) if name in averaged else p.solve(num_kv_heads, rule)
        for name, p in _problems(layer, moments, ridged, layer_scale).items()
    }

    def encoded(name: str) -> dict[str, Any]:
        by_group = (num_kv_heads, have // num_kv_heads, width)
        return {
            leaf: np.einsum("...jh,jhe->...je", x, maps[name][0])
            .reshape(*x.shape[:-2], *by_group)
            .sum(axis=-2)
            for leaf, x in layer[name].items()
        }

    # Queries and output rows take the decoder of the key/value head that served them: (N, H, H).
    back = {name: np.repeat(decoders, num_heads // have, 0) for name, (_, decoders) in maps.items()}
    queries, rows = layer["query"].items(), layer["out"]["kernel"]
    merged = {
        **layer,
        "query": {leaf: np.einsum("...nh,nhe->...ne", x, back["key"]) for leaf, x in queries},
        "key": encoded("key"),
        "value": encoded("value"),
        "out": {**layer["out"], "kernel": np.einsum("nhe,nhd->ned", back["value"], rows)},
    }
    if "value" not in averaged and "bias" in layer["out"]:
        mean, shared_mean = (
            np.repeat(_head_means(x["value"], moments), repeats, axis=0)  # (N, H)
            for x, repeats in ((layer, num_heads // have), (merged, num_heads // num_kv_heads))
        )
        missing = mean - np.einsum("nhe,ne->nh", back["value"], shared_mean)
        merged["out"]["bias"] = layer["out"]["bias"] + np.einsum("nh,nhd->d", missing, rows)
    lost = {
        name: None if name in averaged else p.lost(num_kv_heads, *maps[name])
        for name, p in problems.items()
    }
    balanced = balance_heads(merged)
    return Merged(balanced, energy["key"], lost["key"], energy["value"], lost["value"])


def _mean(have: int, num_kv_heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Encoders and decoders (J, H, H) of mean-pooling."""
    same = np.broadcast_to(np.eye(width), (have, width, width))
    return same * (num_kv_heads / have), same


def balance_heads(attention: Attention) -> dict[str, dict[str, np.ndarray]]:
    """Give every dimension of a shared head the same scale on both sides; the function stays.

    Afterwards the norm of its column in the key kernel is the root mean square of those in the
    kernels of the query heads that it serves, and so for value and output. Weight decay and updates
    of one size for all weights, as Adam makes, then meet what they meet in an ordinary model.
    Dimensions that are dead on either side stay as they are, and so do projections in `NOT_LINEAR`.
    """
    layer = {name: dict(projection) for name, projection in attention.items()}
    num_heads, num_kv_heads = layer["query"]["kernel"].shape[1], layer["key"]["kernel"].shape[1]
    group, averaged = num_heads // num_kv_heads, not_linear(layer)

    def scales(one: np.ndarray, many: np.ndarray) -> np.ndarray:
        """Squared norms (K, H) and (N, H) -> factors (K, H) on the one side."""
        mean = many.reshape(num_kv_heads, group, -1).mean(axis=1)
        alive = np.minimum(one / (one.max() or 1.0), mean / (mean.max() or 1.0)) > 1e-14
        ratio = np.divide(mean, one, out=np.ones_like(one), where=alive)
        return ratio**0.25

    def squares(name: str, axis: int) -> np.ndarray:
        return np.sum(np.square(layer[name]["kernel"]), axis=axis)

    if "key" not in averaged:
        factor = scales(squares("key", 0), squares("query", 0))
        layer["key"] = {leaf: x * factor for leaf, x in layer["key"].items()}
        back = np.repeat(factor, group, axis=0)
        layer["query"] = {leaf: x / back for leaf, x in layer["query"].items()}
    if "value" not in averaged:
        factor = scales(squares("value", 0), squares("out", 2))
        layer["value"] = {leaf: x * factor for leaf, x in layer["value"].items()}
        back = np.repeat(factor, group, axis=0)
        layer["out"]["kernel"] = layer["out"]["kernel"] / back[..., None]
    return layer


@dataclasses.dataclass
class _Problem:
    """What to merge: heads of moment kernel^T seen + mean mean^T, with a weight as in `MERGING`.

    Attributes:
      kernel: (D, J, H) of the heads.
      seen: (D, J, H) the moment of the layer's input times the kernel.
      weight: (J, H, H).
      mean: (J, H) what the moment is not centred about.
    """

    kernel: np.ndarray
    seen: np.ndarray
    weight: np.ndarray
    mean: np.ndarray

    def groups(self, num_kv_heads: int, *more: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        """(moment, weight, *more) of each group."""
        group = len(self.weight) // num_kv_heads
        parts = [slice(i * group, (i + 1) * group) for i in range(num_kv_heads)]
        return [
            (
                np.tensordot(self.kernel[:, p], self.seen[:, p], (0, 0))
                + np.multiply.outer(self.mean[p], self.mean[p]),
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


def _share_kept(energy: np.ndarray | None, lost: np.ndarray | None) -> np.ndarray | None:
    if energy is None:
        return None
    return 1.0 - np.divide(lost, energy, out=np.zeros_like(lost), where=energy > 0.0)


def _seen(layer: Attention, moments: InputMoments) -> dict[str, np.ndarray]:
    """The moment that counts for each kernel times that kernel, of the kernel's shape."""
    by = {"query": moments.covariance, "key": moments.centred, "value": moments.covariance}
    return {name: np.tensordot(moment, layer[name]["kernel"], 1) for name, moment in by.items()}


def _problems(
    layer: Attention,
    moments: InputMoments,
    seen: Mapping[str, np.ndarray],
    layer_scale: np.ndarray | None,
) -> dict[str, _Problem]:
    """Of "key" and "value"; `seen` as `_seen` gives it."""
    query, key, value = (layer[name]["kernel"] for name in ("query", "key", "value"))
    rows, have = layer["out"]["kernel"], key.shape[1]
    if layer_scale is not None:
        rows = rows * np.asarray(layer_scale, np.float64)

    # Key heads and value heads pay for all query heads that they serve.
    means = _head_means(layer["query"], moments)
    spread = query.transpose(1, 2, 0) @ seen["query"].swapaxes(0, 1)
    query_weight = spread + means[:, :, None] * means[:, None, :]
    key_weight, value_weight = (
        x.reshape(have, -1, *x.shape[1:]).sum(axis=1)
        for x in (query_weight, rows @ rows.swapaxes(1, 2))
    )
    # Softmax does not see a mean of keys; one of values goes to the output bias, or is merged.
    centred = np.zeros(key.shape[1:])
    kept = centred if "bias" in layer["out"] else _head_means(layer["value"], moments)
    return {
        "key": _Problem(key, seen["key"], key_weight, centred),
        "value": _Problem(value, seen["value"], value_weight, kept),
    }


def _head_means(projection: Mapping[str, np.ndarray], moments: InputMoments) -> np.ndarray:
    """E of a projection, (heads, H)."""
    return np.tensordot(moments.mean, projection["kernel"], 1) + projection.get("bias", 0.0)


def _check_moments(moments: InputMoments, width: int) -> None:
    if moments.tokens <= 0:
        raise UserError(
            "the moments to merge heads by hold no tokens; give others to calibrate with"
        )
    if moments.total.shape != (width,):
        raise UserError(
            f"moments of {len(moments.total)} features do not fit a layer of width {width}"
        )
    if not all(np.isfinite(x).all() for x in (moments.total, moments.within, moments.between)):
        raise UserError(
            "the moments to merge heads by hold NaN or infinity; check the calibration data"
        )
