"""Size of attention against accuracy, of one pretrained ViT by every rule of conversion.

    pip install elpv-dataset==1.0.0.post1     # 2,624 photographs of solar cells
    python examples/dinov2.py --out dinov2_small
    python examples/front.py --source dinov2_small --images PHOTOGRAPHS --out front

A row is one conversion, without any training: fewer key/value heads (pooled or merged), narrower
heads, both, refitted or not. Its features (without a head: what the pool gives) are compared with
those of the original on images that no conversion saw: R2 (1 - squared error / variance) and mean
cosine. Written are front.json, and front.md, front.png and front.svg made from it. Rows that
front.json holds already are kept: a run that was stopped resumes.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One row: shares of K, H and V of the source's, and how."""

    rule: str
    kv_heads: int
    head_width: int
    v_head_width: int
    calibrated: bool = False
    refit: bool = False

    @property
    def name(self) -> str:
        """Such as "svd, 3 heads, width 48, calibrated"."""
        width = f"{self.head_width}"
        if self.v_head_width != self.head_width:
            width += f"/{self.v_head_width}"
        how = ["calibrated"] * self.calibrated + ["refitted"] * self.refit
        return ", ".join([self.rule, f"{self.kv_heads} KV heads of {width}", *how])


def conversions(heads: int, width: int) -> list[Conversion]:
    """The rows for a model with so many heads of a width: sizes side by side.

    Projections are D (N H + K H + K V + N V): K heads of full width are as large as all heads of
    width H (N + K) / 2N.
    """
    fewer = [k for k in range(heads - 1, 0, -1) if heads % k == 0]
    sizes = [(heads + k) / (2 * heads) for k in fewer] + [0.5, 0.4]

    def narrowed(k: int, share: float) -> int:
        return int(min(width, 2 * heads * width * share // (heads + k)))

    rows = []
    for k in fewer:
        rows.append(Conversion("mean", k, width, width))
        rows += [Conversion("procrustes", k, width, width, True)]
        rows += [Conversion("svd", k, width, width, by) for by in (False, True)]
    rows += [Conversion(rule, fewer[0], width, width) for rule in ("first", "random")]
    for share in (0.95, 0.85, *sizes, 0.3):
        w = narrowed(heads, share)
        rows += [Conversion("width", heads, w, w, by) for by in (False, True)]
    for k in fewer[:2]:
        for share in sizes:
            if share < (heads + k) / (2 * heads):
                w = narrowed(k, share)
                rows += [Conversion("svd", k, w, w, by) for by in (False, True)]
    for share in sizes[::2]:  # queries and keys of another width than values
        w, more = narrowed(heads, share), width // 8
        rows += [Conversion("width", heads, w - d, w + d, True) for d in (more, -more)]
    rows += [
        Conversion("width", heads, h, v, True)
        for h, v in ((width // 2, width), (width, width // 2))
    ]
    refitted = [("mean", fewer[0], 1.0), ("svd", fewer[0], 1.0), ("svd", fewer[-1], 1.0)]
    refitted += [("width", heads, share) for share in (sizes[0], sizes[-3])]
    refitted += [("svd", fewer[0], sizes[-3])]
    for rule, k, share in refitted:
        w = narrowed(k, share)
        rows.append(Conversion(rule, k, w, w, True, True))
    return rows
