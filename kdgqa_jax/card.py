"""Model cards: what a model directory says of itself, as the README.md that model hubs show."""

import collections
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kdgqa_jax import analysis, extras, model_json, paths, workdir
from kdgqa_jax.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

Record = dict[str, Any]

FIGURES = {"top1": "top-1, %", "top5": "top-5, %", "loss": "loss, nats"}
"""Figures of an evaluation that cards show, and what they are called."""

LOADING = """\
With [kdgqa-jax](https://arxiv.org/abs/2408.08454) installed (`pip install "kdgqa-jax[convert]"`):

```python
from kdgqa_jax import checkpoint, predict

model, variables, description = checkpoint.load_model("{name}")
logits = predict.predict_array(model, variables, images).logits  # float32 NHWC, normalised
```

`kdgqa predict --checkpoint {name} --images FOLDER` prepares image files and shows their classes;
`kdgqa export --checkpoint {name} --out {name}.npz` makes a function that needs JAX and NumPy alone.
"""


def model_card(
    directory: str | os.PathLike,
    results: Sequence[str | os.PathLike] = (),
    license: str | None = None,
) -> "ModelCard":
    """The card of a model directory: a `huggingface_hub.ModelCard`.

    Everything comes from records: of the directory, of the run that it lies in (RUN/model beside
    RUN/result.json), and of evaluations.

    Args:
      directory: a model directory.
      results: files that `kdgqa evaluate --out` has written.
      license: an identifier of the hub; None: none is stated.

    Raises:
      UserError: no model there, or a file that is no record of an evaluation.
    """
    extras.needs("huggingface_hub", "a model card")
    from huggingface_hub import ModelCard, ModelCardData

    facts, _ = analysis.summarise(directory)
    description = model_json.read(paths.local(directory) / "model.json")
    place = paths.local(directory).absolute()
    records = [*_of_run(place, description), *map(_of_evaluation, results)]
    data = ModelCardData(
        model_name=place.parent.name if place.name == "model" else place.name,
        license=license,
        library_name="kdgqa-jax",
        pipeline_tag="image-classification" if description["class_names"] else None,
        tags=["vision transformer", "grouped query attention", dict(facts)["attention"]],
        datasets=sorted({name for name, *_ in _trained_on(description)}) or None,
        eval_results=[result for record in records for result in _eval_results(record)] or None,
    )
    sections = {
        "Model": _table(("", "value"), facts),
        "Source": _source(description),
        "Training data": _data(description),
        "Results": _results(records),
        "How to load it": LOADING.format(name=place.name),
        "Versions": ", ".join(f"{n} {v}" for n, v in description.get("versions", {}).items()),
    }
    body = [f"## {title}\n\n{text.strip()}\n" for title, text in sections.items() if text]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {data.model_name}\n\n" + "\n".join(body))


def write(
    directory: str | os.PathLike,
    out: str | os.PathLike | None = None,
    results: Sequence[str | os.PathLike] = (),
    license: str | None = None,
) -> pathlib.Path:
    """Write `model_card` to a new .md file, README.md beside the model if None; where it is.

    Raises UserError: what `model_card` raises, or a file that is there or cannot be written.
    """
    place = paths.local(directory) / "README.md" if out is None else paths.local(out)
    if place.suffix != ".md":
        raise UserError(f"{place}: a model card is Markdown; give a name that ends in .md")
    place = workdir.check_new(place)
    text = str(model_card(directory, results, license))
    with workdir.written_file(place) as temporary:
        temporary.write_text(text)
    return place


# --- records ------------------------------------------------------------------------------------


def _trained_on(description: Record) -> Iterator[tuple[str, Record]]:
    """(data set, fields of the config's `data`) of the last training run."""
    data = description.get("trained_on", {}).get("data", {})
    if data.get("name"):
        yield data["name"], data


def _of_run(place: pathlib.Path, description: Record) -> Iterator[Record]:
    """What the run that has made the model found out on its test split at the end."""
    record = place.parent / "result.json"
    if place.name == "model" and record.is_file():
        for name, data in _trained_on(description):
            shift = data.get("shift", "none")
            yield {"dataset": name, "split": "test", "shift": shift, **workdir.read_json(record)}


def _of_evaluation(path: str | os.PathLike) -> Record:
    record = workdir.read_json(paths.local(path))
    needed = ("dataset", "split", "top1", "top5", "loss")
    if not isinstance(record, dict) or any(name not in record for name in needed):
        raise UserError(f"{path} is no record of an evaluation; `kdgqa evaluate --out` writes them")
    return record


def _eval_results(record: Record) -> Iterator["EvalResult"]:
    from huggingface_hub import EvalResult

    for field, name in FIGURES.items():
        yield EvalResult(
            task_type="image-classification",
            dataset_type=record["dataset"],
            dataset_name=_named(record),
            dataset_split=record["split"],
            metric_type="accuracy" if field == "top1" else field,
            metric_name=name,
            metric_value=record[field],
        )


def _named(record: Record) -> str:
    shift = record.get("shift", "none")
    return record["dataset"] + ("" if shift == "none" else f" ({shift})")


# --- sections -----------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _source(description: Record) -> str:
    converted = description.get("converted") or {}
    start = description.get("trained_on", {}).get("init")
    source, rule = converted.get("source") or converted.get("from"), converted.get("rule")
    lines = [
        f"Converted from `{source}`." if source else "",
        f"Rule of conversion for key/value heads: {rule}." if rule else "",
        f"Training started from `{start}`." if start else "",
    ]
    said = " ".join(line for line in lines if line) or "Trained from newly initialised weights."
    hows = collections.Counter(row["how"] for row in converted.get("parameters", ()))
    done = [f"{how} ({count} kinds of parameters)" for how, count in hows.items()]
    notes = [*converted.get("notes", ()), *converted.get("warnings", ()), *done]
    return "\n".join([said, "", *(f"- {note}" for note in notes)])


def _data(description: Record) -> str:
    for name, data in _trained_on(description):
        shift = "" if data.get("shift", "none") == "none" else f", shifted by {data['shift']}"
        return f"{name}{shift}; {description['trained_on']['steps']:,} updates."
    return ""


def _results(records: Sequence[Record]) -> str:
    if not records:
        return ""
    rows = [
        [_named(r), r["split"], *("" if r[f] is None else f"{r[f]:.4g}" for f in FIGURES)]
        for r in records
    ]
    return _table(("data", "split", *FIGURES.values()), rows)
