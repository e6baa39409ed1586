"""Plots as functions: each takes arrays or records and returns a matplotlib figure.

    figure = plots.accuracy(records)
    plots.save(figure, folder, "accuracy")     # accuracy.png and accuracy.svg

accuracy           top-1 of every entry after every stage of a study
allocation         query heads per key/value head over training, entry by entry
key_norms          key head norms over training, layer by layer
idle_heads         key/value heads without query heads over training
training           loss, accuracy, learning rate and gradient norm of a run
similarity         cosines of heads with each other
noise              similarity over the scales of PGQA's noise
key_norm_spread    key norms over images, heads and layers
allocation_spread  query heads per key/value head over images
"""

from kdgqa_jax.plots.heads import allocation_spread, key_norm_spread, noise, similarity
from kdgqa_jax.plots.study import accuracy
from kdgqa_jax.plots.style import save
from kdgqa_jax.plots.training import allocation, idle_heads, key_norms, training

__all__ = [
    "accuracy",
    "allocation",
    "allocation_spread",
    "idle_heads",
    "key_norm_spread",
    "key_norms",
    "noise",
    "save",
    "similarity",
    "training",
]
