"""Records of a study, as results.json has them: rows of its tables, stages, values by seed.

A record is what one stage of one entry and seed came to: `entry`, `seed`, `stage`, `top1`
(percent) and more; one without `top1` is of a cell that failed. With `untrained_head` the logits
were the same for all images, so top-1 says nothing. Entries are called VARIANT, VARIANT (RULE) or,
in a grid, with settings of its axes: "dgqa_ema (svd), K=2, window=100".
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]

PRETRAINED = "pretrained"
"""The stage that is shared by all entries of a seed; it is no row of a table."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An entry by the parts of its name.

    Attributes:
      variant: of attention.
      rule: of conversion; "": the default of the study.
      settings: of the axes of a grid, such as "K=2".
    """

    variant: str
    rule: str = ""
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, entry: str) -> "Row":
        """The parts of a name."""
        name, *settings = entry.split(", ")
        variant, rule = re.fullmatch(r"(.*?)(?: \((.*)\))?", name, re.DOTALL).groups()
        return cls(variant, rule or "", tuple(settings))

    @property
    def name(self) -> str:
        """The name of the entry."""
        name = f"{self.variant} ({self.rule})" if self.rule else self.variant
        return ", ".join([name, *self.settings])

    def within(self, other: "Row") -> bool:
        """Every setting is one of the other row's, so what was computed serves both."""
        return set(self.settings) <= set(other.settings)


def data_of(record: Record) -> str:
    """The data set of a record; "" where it does not say."""
    return record.get("config", {}).get("data", {}).get("name", "")


class Results:
    """The records of a study, by row, stage and seed.

    Attributes:
      records: those with figures, in the order of results.json, without those of failed cells.
      failed: one for each cell that failed, with the reason in "failed".
      stages: names after `PRETRAINED`, in order; of untrained heads only if there are no others.
      rows: of the tables, in order. A row whose settings another row has too, and which ends at an
        earlier stage, is a stage that several rows share: it is no row of its own.
    """

    def __init__(self, records: Iterable[Record]):
        records = list(records)
        self.failed = [r for r in records if r.get("top1") is None]
        lost = {(r.get("entry"), r.get("seed")) for r in self.failed}
        self.records = [r for r in records if (r.get("entry"), r.get("seed")) not in lost]
        self._names = {r["stage"] for r in self.records}
        own = [r for r in self.records if r["stage"].split()[-1] != PRETRAINED]
        own = [r for r in own if not r.get("untrained_head")] or own
        self.stages = list(dict.fromkeys(r["stage"] for r in own))
        self._found: dict[tuple[Row, str], dict[int, Record]] = {}
        for r in own:
            self._found.setdefault((Row.parse(r["entry"]), r["stage"]), {})[r["seed"]] = r
        rows = list(dict.fromkeys(row for row, _ in self._found))
        self.rows = [row for row in rows if not self._is_shared(row, rows)]

    def _is_shared(self, row: Row, rows: Sequence[Row]) -> bool:
        return any(
            other != row
            and (other.variant, other.rule) == (row.variant, row.rule)
            and row.within(other)
            and self._end(row) < self._end(other)
            for other in rows
        )

    def _end(self, row: Row) -> int:
        return max(self.stages.index(stage) for name, stage in self._found if name == row)

    def of(self, row: Row, stage: str) -> dict[int, Record]:
        """The records of a row after a stage, by seed; {}: there are none.

        Where it has none of its own they are those of the row with most of its settings.
        """
        shared = [
            name
            for name, at in self._found
            if at == stage
            and (name.variant, name.rule) == (row.variant, row.rule)
            and name.within(row)
        ]
        source = max(shared, key=lambda name: len(name.settings), default=None)
        return self._found.get((source, stage), {})

    def rows_at(self, stage: str) -> list[Row]:
        """The rows with records of a stage; of those that share it, by their folder, the first."""
        found: dict[Any, Row] = {}
        for row in self.rows:
            records = self.of(row, stage)
            folders = tuple(r.get("folder", id(r)) for _, r in sorted(records.items()))
            if records:
                found.setdefault(folders, row)
        return list(found.values())

    def values(self, row: Row, stage: str, field: str = "top1") -> list[float]:
        """A field of the records of a row after a stage, in the order of seeds."""
        return [record[field] for _, record in sorted(self.of(row, stage).items())]

    def last(self, row: Row) -> dict[int, Record]:
        """The records of the last stage of a row that is no probe, by seed."""
        stages = [s for s in self.stages if self.of(row, s)]
        models = [s for s in stages if not self.is_probe(s)]
        return self.of(row, (models or stages)[-1])

    def is_probe(self, stage: str) -> bool:
        """The stage is a probe of another one, such as "knn converted"."""
        return stage.partition(" ")[2] in self._names

    def base(self, probe: str = "") -> list[Record]:
        """Those of the pretrained model, or of a probe of it: one for each seed."""
        stage = f"{probe} {PRETRAINED}".strip()
        return [r for r in self.records if r["stage"] == stage and not r.get("untrained_head")]

    @property
    def seeds(self) -> list[int]:
        """Of all records, in order."""
        return sorted({r["seed"] for r in self.records})
