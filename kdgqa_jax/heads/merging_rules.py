"""How the heads of a group are merged into one: the table of rules.

    H  width of one head    G  heads of the group    E  width of the head that is wanted

numpy and float64. What a rule is given and gives is said at `MERGING`.
"""

from collections.abc import Callable

import numpy as np

FLOOR = 1e-6  # least eigenvalue under a square root, as a share of the largest one
# Moments summed in float32 are known to about that. It bounds how much a direction that queries or
# outputs hardly use is blown up.


def symmetric_root(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square root and its inverse of (..., H, H) positive semidefinite; of zero: zero and zero."""
    values, vectors = np.linalg.eigh(x)
    roots = np.sqrt(np.maximum(values, FLOOR * np.maximum(values[..., -1:], 0.0)))
    inverses = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0.0)

    def back(diagonal: np.ndarray) -> np.ndarray:
        return (vectors * diagonal[..., None, :]) @ vectors.swapaxes(-1, -2)

    return back(roots), back(inverses)


def _svd(
    moment: np.ndarray, weight: np.ndarray, wanted: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Eckart-Young: the top E eigenvectors of the moment in the metric of the weights."""
    group, width = moment.shape[:2]
    root, inverse = symmetric_root(weight)
    weighted = np.einsum("gab,gbhc,hcd->gahd", root, moment, root, optimize=True)
    weighted = weighted.reshape(group * width, group * width)
    vectors = np.linalg.eigh((weighted + weighted.T) / 2)[1][:, ::-1][:, : wanted or width]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    vectors = vectors * np.where(largest < 0.0, -1.0, 1.0)  # LAPACK leaves the signs open
    vectors = vectors.reshape(group, width, -1)
    return root @ vectors, inverse @ vectors


def _procrustes(
    moment: np.ndarray, weight: np.ndarray, wanted: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate every head onto the sum of the others, in turns, until nothing gains; then pool.

    It starts by rotating all heads onto the one with the most energy, and each turn raises the sum
    of products between the heads, so that it ends, and always in the same place.
    """
    del weight, wanted  # a rotation keeps the width
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


MERGING: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "svd": _svd,
    "procrustes": _procrustes,
}
"""How the heads of a group are merged: moment, weight, E -> encoders and decoders (G, H, E).

E is H where it is not given. The moment (G, H, G, H) is that of the centred heads, the mean of
k[g] k[h]^T; weight[g] (H, H) is what an error of head g costs: E[q q^T] of its
queries, or W_o W_o^T of its output rows.
"""

NARROWING = ("svd",)
"""Rules of `MERGING` whose heads may be narrower than before; those of the rest are as wide."""
