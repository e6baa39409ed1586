"""What a rule of merging has to solve, and what its solution costs: by layer, "key" and "value".

    D  model width    N  query heads    H  width of one head, of values too    E  width wanted
    J  key/value heads that there are   K  key/value heads wanted    G  heads of a group (J/K)

numpy and float64.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from kdgqa_jax.heads.merging_rules import MERGING, symmetric_root
from kdgqa_jax.heads.moments import InputMoments

Layer = Mapping[str, Mapping[str, Any]]  # `merging.Attention`


@dataclasses.dataclass
class Problem:
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

    def solve(self, num_kv_heads: int, rule: str, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Encoders and decoders of all heads, (J, H, E) each."""
        maps = [MERGING[rule](*group, wanted) for group in self.groups(num_kv_heads)]
        encoders, decoders = zip(*maps, strict=True)
        return np.concatenate(encoders), np.concatenate(decoders)

    def spectrum(self, num_kv_heads: int) -> np.ndarray:
        """(K, G*H), descending: the energy of each direction of a group, what `svd` goes by."""
        found = []
        for moment, weight in self.groups(num_kv_heads):
            group, width = moment.shape[:2]
            roots = symmetric_root(weight)[0]
            energies = np.einsum("gab,gbhc,hcd->gahd", roots, moment, roots, optimize=True)
            energies = energies.reshape(group * width, group * width)
            found.append(np.linalg.eigvalsh((energies + energies.T) / 2)[::-1])
        return np.maximum(np.array(found), 0.0)

    def energy(self, num_kv_heads: int) -> np.ndarray:
        """(K,)."""
        return np.array([_energy(*group) for group in self.groups(num_kv_heads)])

    def lost(self, num_kv_heads: int, encoders: np.ndarray, decoders: np.ndarray) -> np.ndarray:
        """(K,) energy of what reading the shared head back does not give."""
        lost = []
        for moment, weight, encoder, decoder in self.groups(num_kv_heads, encoders, decoders):
            group, width = moment.shape[:2]
            size = group * width
            error = np.eye(size) - decoder.reshape(size, -1) @ encoder.reshape(size, -1).T
            moment = error @ moment.reshape(size, size) @ error.T
            lost.append(_energy(moment.reshape(group, width, group, width), weight))
        return np.array(lost)


def _energy(moment: np.ndarray, weight: np.ndarray) -> float:
    return float(np.einsum("gagb,gba->", moment, weight))


def moments_seen(layer: Layer, moments: InputMoments) -> dict[str, np.ndarray]:
    """The moment that counts for each kernel times that kernel, of the kernel's shape."""
    by = {"query": moments.covariance, "key": moments.centred, "value": moments.covariance}
    return {name: np.tensordot(moment, layer[name]["kernel"], 1) for name, moment in by.items()}


def problems_of(
    layer: Layer,
    moments: InputMoments,
    seen: Mapping[str, np.ndarray],
    layer_scale: np.ndarray | None,
) -> dict[str, Problem]:
    """Of "key" and "value"; `seen` as `moments_seen` gives it."""
    query, key, value = (layer[name]["kernel"] for name in ("query", "key", "value"))
    rows, have = layer["out"]["kernel"], key.shape[1]
    if layer_scale is not None:
        rows = rows * np.asarray(layer_scale, np.float64)

    # Key heads and value heads pay for all query heads that they serve.
    means = head_means(layer["query"], moments)
    spread = query.transpose(1, 2, 0) @ seen["query"].swapaxes(0, 1)
    query_weight = spread + means[:, :, None] * means[:, None, :]
    key_weight, value_weight = (
        x.reshape(have, -1, *x.shape[1:]).sum(axis=1)
        for x in (query_weight, rows @ rows.swapaxes(1, 2))
    )
    # Softmax does not see a mean of keys; one of values goes to the output bias, or is merged.
    centred = np.zeros(key.shape[1:])
    kept = centred if "bias" in layer["out"] else head_means(layer["value"], moments)
    return {
        "key": Problem(key, seen["key"], key_weight, centred),
        "value": Problem(value, seen["value"], value_weight, kept),
    }


def head_means(projection: Mapping[str, np.ndarray], moments: InputMoments) -> np.ndarray:
    """E of a projection, (heads, H)."""
    return np.tensordot(moments.mean, projection["kernel"], 1) + projection.get("bias", 0.0)
