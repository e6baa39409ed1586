"""Looking inside: what models do with images, how alike their heads are, what a directory holds.

seen = analysis.capture(model, variables, images)
analysis.similarity(seen.maps, seen.group_index[:, None]).within   # (L, B)

capture            maps, outputs, key norms and allocations of a batch
similarity         cosines of heads: within and between groups
self_similarity    cosines of heads before and after something
perturbed          maps and outputs less PGQA's noise
analyse            all of that over many images and noise scales
over_training      what a run logged by layer, as arrays
summarise          the sizes of a model directory
"""

from kdgqa_jax.analysis.capturing import Captured, capture
from kdgqa_jax.analysis.heads import (
    Similarity,
    over_training,
    perturbed,
    self_similarity,
    similarity,
)
from kdgqa_jax.analysis.images import (
    KINDS,
    NOISE_SCALES,
    Analysis,
    analyse,
    analyse_directory,
)
from kdgqa_jax.analysis.summary import LAYER_HEADER, fixed_allocations, summarise

__all__ = [
    "KINDS",
    "LAYER_HEADER",
    "NOISE_SCALES",
    "Analysis",
    "Captured",
    "Similarity",
    "analyse",
    "analyse_directory",
    "capture",
    "fixed_allocations",
    "over_training",
    "perturbed",
    "self_similarity",
    "similarity",
    "summarise",
]
