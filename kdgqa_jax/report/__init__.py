"""Reports of studies, training runs (`kdgqa report`) and heads (`kdgqa analyse`).

heads.py    JSON and plots of an analysis of heads
study.py    results.json, results.md, tables, plots, and a page of it all
run.py      curves and a page of one run
tables.py   what is in tables, as Markdown, CSV and LaTeX
page.py     one HTML page that loads nothing
recipe.py   a config file that gives a config again
"""

import os
from collections.abc import Sequence

from kdgqa_jax import paths, workdir
from kdgqa_jax.errors import UserError
from kdgqa_jax.report import recipe, run, study

__all__ = ["build"]


def build(directory: str | os.PathLike, baselines: Sequence[str] = ()) -> paths.Path:
    """Write DIRECTORY/report from what a study or a training run has left there.

    Args:
      directory: the workdir of a study that has ended, or of a run that may still be going.
      baselines: of a study, entries that the others are compared with; none: `gqa`.

    Returns:
      The folder of the report; report.html is in it.

    Raises:
      UserError: there is neither, a study that has not ended or of which all has failed, baselines
        that are no entries, damaged files.
    """
    place = paths.absolute(directory, "workdir")
    if not (place / "config.json").exists():
        raise UserError(
            f"workdir {place} holds neither a study nor a training run (no config.json); give the"
            " --workdir of kdgqa study, demo or train"
        )
    folder = place / "report"
    config = workdir.read_json(place / "config.json")
    if not isinstance(config, dict) or not config.keys() & {"variants", "model"}:
        raise UserError(f"{place / 'config.json'} is the config of neither a study nor a run")
    if not recipe.is_study(config):
        if baselines:
            raise UserError(f"workdir {place} holds one run; baselines are of a study")
        run.write(place, folder)
        return folder
    records, histories = study.read(place)
    study.check(place, records, baselines)
    study.write(records, histories, folder, config, baselines)
    return folder
