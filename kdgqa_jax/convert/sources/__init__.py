"""Where checkpoints come from: one file for each framework, `LAYOUTS` the table of all.

A source says its names, the surgery on its arrays, what its weights do not show, what lies beside
them and how it resizes position embeddings: `layout.Layout`. Nothing else knows it by name.
"""

from kdgqa_jax.convert.sources import (
    augreg,
    clip,
    dinov2,
    hugging_face,
    open_clip,
    released,
    timm,
)
from kdgqa_jax.convert.sources.layout import Layout

LAYOUTS: dict[str, Layout] = {
    **timm.LAYOUTS,
    **released.LAYOUTS,
    **hugging_face.LAYOUTS,
    **augreg.LAYOUTS,
    **dinov2.LAYOUTS,
    **clip.LAYOUTS,
    **open_clip.LAYOUTS,
}
