"""Fewer and narrower key/value heads of which every query head still makes almost what it made.

The heads of a group are mapped into one shared head, which may be narrower than they are, and the
query and output projections are adapted to it. All maps are linear and fold into the weights. numpy
and float64 throughout; nothing here depends on a model, so the same functions serve any
self-attention with biases or without (ViT, BERT).

    D  model width    N  query heads    H  width of one head, of values too    E  width wanted
    J  key/value heads that there are   K  key/value heads wanted
    G  heads of a group (J/K), each of which serves N/J query heads

A rule of `MERGING` gives, for each head of a group, an encoder E[g] and a decoder R[g] (H, E each):

    shared head = sum_g E[g]^T k[g]        k[g] is read back as R[g] (shared head)

Queries become R^T q and output rows R^T W_o. `svd` (after arXiv 2406.07056) takes the E and R with
the least expected squared error of the logits, queries and keys taken as independent, and of each
head's contribution to the output; the error is what the discarded eigenvalues sum up to. With
groups of one (K = J) it truncates the singular value decompositions of the products of each head's
query and key weights, and of its value and output weights: narrower heads (after arXiv 2411.17426
and 2505.12942). Attention divides logits by the root of the new width; queries and keys make up for
it.

A norm between the two sides of a product lets no map through: see `NOT_LINEAR`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.heads.merging_problem import head_means, moments_seen, problems_of
from kdgqa_jax.heads.merging_rules import MERGING, NARROWING
from kdgqa_jax.heads.moments import InputMoments
from kdgqa_jax.heads.pooling import check_groups

Attention = Mapping[str, Mapping[str, Any]]
"""One layer: "query" (D,N,H), "key" (D,J,H), "value" (D,J,V), "out" (N,V,D): {"kernel", "bias"}.

V may be another width than H. Biases (N,H), (J,H), (J,V), (D,); any may be missing. "q_norm",
"k_norm" and "norm" are there where the layer has those norms; they stay as they are.
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
    *,
    head_width: int | None = None,
    v_head_width: int | None = None,
) -> Merged:
    """Merge, and make narrower, the key/value heads of one attention layer.

    The weight (out, in) of a linear layer of PyTorch is `weight.T.reshape(D, N, H)` here, that of
    the output projection `weight.T.reshape(N, H, D)`.

    Args:
      attention: arrays of the layer, see `Attention`; J key/value heads, of which head j serves the
        query heads j*N/J .. (j+1)*N/J - 1.
      num_kv_heads: K; divides J. K == J with heads as wide as they are changes nothing.
      moments: of the layer's input.
      rule: a name in `MERGING`.
      layer_scale: (D,) factors on what the output projection gives: they say what an error there
        costs. None: ones.
      head_width: of the queries and keys wanted, at most H; None: H.
      v_head_width: of the values wanted, at most V; None: V.

    Returns:
      The merged layer in float64, balanced as `balance_heads` does, and the energies.

    Raises:
      UserError: K does not divide J, an unknown rule, widths that the rule or the layer does not
        give, moments that are empty, of another width or not finite, a layer of which nothing is
        linear.
    """
    if rule not in MERGING:
        raise unknown("merging rule", rule, MERGING)
    layer = {
        name: {leaf: np.asarray(x, np.float64) for leaf, x in projection.items()}
        for name, projection in attention.items()
    }
    model_width = len(layer["query"]["kernel"])
    have = layer["key"]["kernel"].shape[1]
    check_groups(have, num_kv_heads)
    _check_moments(moments, model_width)
    averaged = not_linear(layer)
    widths = _widths(layer, rule, {"key": head_width, "value": v_head_width})
    changed = [n for n, (old, new) in widths.items() if old != new or have != num_kv_heads]
    seen = moments_seen(layer, moments)
    problems = problems_of(layer, moments, seen, layer_scale)
    energy = {n: None if n in averaged else p.energy(num_kv_heads) for n, p in problems.items()}
    if not changed:
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
        name: p.solve(num_kv_heads, rule, widths[name][1])
        if name in changed and name not in averaged
        else _mean(have, num_kv_heads, widths[name][0])
        for name, p in problems_of(layer, moments, ridged, layer_scale).items()
    }
    merged = _mapped(layer, maps, num_kv_heads, None if "value" in averaged else moments)
    lost = {
        name: None if name in averaged else p.lost(num_kv_heads, *maps[name])
        for name, p in problems.items()
    }
    balanced = balance_heads(merged, changed)
    old, new = widths["key"]
    if old != new:  # the logits are divided by the root of the new width
        for name in ("query", "key"):
            balanced[name] = {leaf: x * (new / old) ** 0.25 for leaf, x in balanced[name].items()}
    return Merged(balanced, energy["key"], lost["key"], energy["value"], lost["value"])


def _widths(
    layer: Attention, rule: str, wanted: Mapping[str, int | None]
) -> dict[str, tuple[int, int]]:
    """(width, width wanted) of "key" and "value" heads. Raises UserError: not to be had."""
    averaged, widths = not_linear(layer), {}
    for name, width in wanted.items():
        old = layer[name]["kernel"].shape[2]
        new = old if width is None else width
        widths[name] = (old, new)
        if not 1 <= new <= old:
            raise UserError(f"{name} heads of width {old} cannot become {new} wide: at most {old}")
        if new != old and name in averaged:
            option, other = averaged[name], {"key": "v_head_width", "value": "head_width"}[name]
            raise UserError(
                f"{name} heads cannot become narrower in layers with {option}, whose norm lets no"
                f" linear map through; make the others narrower alone: {other}"
            )
        if new != old and rule not in NARROWING:
            raise UserError(
                f"{rule} leaves heads as wide as they are; {' and '.join(NARROWING)} makes them"
                f" narrower ({name} heads of width {old} to {new})"
            )
    return widths


def _mapped(
    layer: Attention,
    maps: Mapping[str, tuple[np.ndarray, np.ndarray]],
    num_kv_heads: int,
    moments: InputMoments | None,
) -> dict[str, dict[str, np.ndarray]]:
    """A layer with the maps folded into its weights.

    Args:
      layer: J key/value heads.
      maps: of "key" and "value" heads, encoders and decoders (J, H, E).
      num_kv_heads: K.
      moments: of the layer's input: what values lose of their means goes to the output bias. None:
        it does not.
    """
    num_heads, have = layer["query"]["kernel"].shape[1], layer["key"]["kernel"].shape[1]

    def encoded(name: str) -> dict[str, Any]:
        encoders = maps[name][0]
        by_group = (num_kv_heads, have // num_kv_heads, encoders.shape[2])
        return {
            leaf: np.einsum("...jh,jhe->...je", x, encoders)
            .reshape(*x.shape[:-2], *by_group)
            .sum(axis=-2)
            for leaf, x in layer[name].items()
        }

    # Queries and output rows take the decoder of the key/value head that served them: (N, H, E).
    back = {name: np.repeat(decoders, num_heads // have, 0) for name, (_, decoders) in maps.items()}
    queries, rows = layer["query"].items(), layer["out"]["kernel"]
    merged = {
        **layer,
        "query": {leaf: np.einsum("...nh,nhe->...ne", x, back["key"]) for leaf, x in queries},
        "key": encoded("key"),
        "value": encoded("value"),
        "out": {**layer["out"], "kernel": np.einsum("nhe,nhd->ned", back["value"], rows)},
    }
    if moments is not None and "bias" in layer["out"]:
        mean, shared_mean = (
            np.repeat(head_means(x["value"], moments), repeats, axis=0)  # (N, H)
            for x, repeats in ((layer, num_heads // have), (merged, num_heads // num_kv_heads))
        )
        missing = mean - np.einsum("nhe,ne->nh", back["value"], shared_mean)
        merged["out"]["bias"] = layer["out"]["bias"] + np.einsum("nh,nhd->d", missing, rows)
    return merged


def _mean(have: int, num_kv_heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Encoders and decoders (J, H, H) of mean-pooling."""
    same = np.broadcast_to(np.eye(width), (have, width, width))
    return same * (num_kv_heads / have), same


def balance_heads(
    attention: Attention, sides: Collection[str] = ("key", "value")
) -> dict[str, dict[str, np.ndarray]]:
    """Give every dimension of a shared head the same scale on both sides; the function stays.

    Afterwards the norm of its column in the key kernel is the root mean square of those in the
    kernels of the query heads that it serves, and so for value and output. Weight decay and updates
    of one size for all weights, as Adam makes, then meet what they meet in an ordinary model.
    Dimensions that are dead on either side stay as they are, and so do projections in `NOT_LINEAR`
    and those that are not in `sides`.
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

    if "key" in sides and "key" not in averaged:
        factor = scales(squares("key", 0), squares("query", 0))
        layer["key"] = {leaf: x * factor for leaf, x in layer["key"].items()}
        back = np.repeat(factor, group, axis=0)
        layer["query"] = {leaf: x / back for leaf, x in layer["query"].items()}
    if "value" in sides and "value" not in averaged:
        factor = scales(squares("value", 0), squares("out", 2))
        layer["value"] = {leaf: x * factor for leaf, x in layer["value"].items()}
        back = np.repeat(factor, group, axis=0)
        layer["out"]["kernel"] = layer["out"]["kernel"] / back[..., None]
    return layer


def _share_kept(energy: np.ndarray | None, lost: np.ndarray | None) -> np.ndarray | None:
    if energy is None:
        return None
    return 1.0 - np.divide(lost, energy, out=np.zeros_like(lost), where=energy > 0.0)


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
