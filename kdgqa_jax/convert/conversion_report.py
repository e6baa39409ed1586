"""What a conversion did with every array."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass
class Origin:
    """One of our parameters: where it comes from and what was done to it, in order."""

    source: str  # its name in the source; "" for a new one
    shape: tuple[int, ...] = ()
    how: list[str] = dataclasses.field(default_factory=list)


class ConversionReport:
    """The origin of every parameter, what was left over in the source, remarks and warnings."""

    HEADER = ("parameter", "shape", "from", "how")

    def __init__(self, source: str):
        self.source = source
        self.origins: dict[str, Origin] = {}
        self.left_over: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.energy_kept: dict[str, dict[str, list[float]]] = {}  # of merged heads, by layer

    def add(self, name: str, source: str, *how: str) -> None:
        """A parameter that comes from an array of the source."""
        self.origins[name] = Origin(source, how=[h for h in how if h])

    def changed(self, name: str, how: str) -> None:
        """Something more was done to a parameter."""
        self.origins[name].how.append(how)

    def renew(self, name: str, how: str) -> None:
        """A parameter is newly initialised."""
        self.origins[name] = Origin("", how=[how])

    def drop(self, name: str) -> None:
        """A parameter is no longer there."""
        self.origins.pop(name, None)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Cells under `HEADER`; what is alike in all blocks is one row."""
        grouped: dict[tuple[str, ...], list[int]] = {}
        for name, entry in self.origins.items():
            number = re.match(r"blocks_(\d+)/", name)
            cells = (
                re.sub(r"^blocks_\d+/", "blocks_*/", name),
                "x".join(map(str, entry.shape)),
                re.sub(rf"(?<!\d){number[1]}(?!\d)", "*", entry.source, count=1)
                if number
                else entry.source,
                "; ".join(entry.how) or "loaded",
            )
            grouped.setdefault(cells, []).append(int(number[1]) if number else -1)
        rows = []
        for (name, *rest), numbers in grouped.items():
            rows.append((name.replace("*", _span(numbers), 1), *rest))
        return [*rows, *(("", "", name, "left over, as allowed") for name in self.left_over)]

    def __str__(self) -> str:
        lines = [
            f"{name} {shape}: {source or '-'}, {how}" for name, shape, source, how in self.rows()
        ]
        return "\n".join([*lines, *self.notes, *self.warnings])

    def to_json(self) -> dict[str, Any]:
        """What a model directory keeps."""
        rows = [dict(zip(self.HEADER, row, strict=True)) for row in self.rows()]
        fields = {"source": self.source, "notes": self.notes, "parameters": rows}
        more = {"warnings": self.warnings, "energy_kept": self.energy_kept}
        return fields | {name: value for name, value in more.items() if value}


def _span(numbers: list[int]) -> str:
    """0, 1, 2 -> 0..2; 0, 2, 5 -> 0,2,5."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(map(str, numbers))
