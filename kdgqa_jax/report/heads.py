"""What an analysis of heads leaves: analysis.json, plots, and a table for the terminal."""

import dataclasses
from typing import Any

import numpy as np

from kdgqa_jax import paths, plots, version, vit, workdir
from kdgqa_jax.analysis import KINDS, Analysis
from kdgqa_jax.noise import Noise
from kdgqa_jax.report.tables import Table


def similarity_table(found: Analysis) -> Table:
    """A row for each layer: similarity within and between groups, without noise."""

    def text(value: float) -> str:
        return f"{value:.3f}" if np.isfinite(value) else ""

    relations = {"within": found.within, "between": found.between}
    header = ["layer", *(f"{name} ({kind})" for kind in KINDS for name in relations)]
    rows = [
        [str(i), *(text(x[kind][0, i]) for kind in KINDS for x in relations.values())]
        for i in range(found.key_norms.shape[1])
    ]
    return Table(header, rows)


def write(
    found: Analysis,
    groups: np.ndarray,
    model: vit.VisionTransformer,
    folder: paths.Path,
    about: dict[str, Any],
) -> None:
    """Write analysis.json and the plots (PNG and SVG) as a new folder; whole or not at all.

    Args:
      found: by `analysis.analyse`.
      groups: (L, N) group indices that frame the heads.
      model: that was analysed.
      folder: is made.
      about: what was analysed, for analysis.json.

    Raises:
      UserError: the folder cannot be written.
    """
    noise = model.attention.noise or Noise()
    selves = {kind: x.mean(-1) for kind, x in found.self.items()}
    relations = {"within": found.within, "between": found.between, "self": selves}
    figures = {
        "similarity": plots.similarity({kind: x[0] for kind, x in found.cosine.items()}, groups),
        "noise": plots.noise(found.noise_scales, relations),
        "key_norm": plots.key_norm_spread(found.key_norms),
        "allocation": plots.allocation_spread(found.allocations),
    }
    described = {
        **about,
        "attention": {"variant": model.attention.variant, "noise": dataclasses.asdict(noise)},
        "versions": version.versions(),
        **found.to_json(),
    }
    with workdir.written_whole(folder) as partial:
        workdir.write_json(partial / "analysis.json", described)
        for name, figure in figures.items():
            plots.save(figure, partial, name)
