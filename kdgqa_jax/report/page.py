"""One HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import Any

from kdgqa_jax import paths, plots
from kdgqa_jax.report.tables import Table


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot on a page.

    Attributes:
      svg: the content of its file.
      width: in pixels, of its natural size.
      about: what it shows, for those who do not see it and below it.
    """

    svg: bytes
    width: int
    about: str

    @classmethod
    def saved(cls, figure: Any, about: str, folder: paths.Path, name: str) -> "Figure":
        """That of matplotlib, which is written to `folder`/NAME.png and .svg, too."""
        width = round(100 * figure.get_size_inches()[0])
        return cls(plots.save(figure, folder, name), width, about)

    @property
    def source(self) -> str:
        """The plot itself, as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclasses.dataclass(frozen=True)
class Code:
    """Text as it is: a command, a file."""

    text: str


@dataclasses.dataclass(frozen=True)
class Lines:
    """A list of sentences."""

    lines: Sequence[str]


Block = str | Table | Figure | Code | Lines
"""What a section holds; a str is a paragraph."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
      title: its heading.
      blocks: what it holds, in order.
      folded: it is opened by the reader.
      bad: it reports what went wrong.
    """

    title: str
    blocks: Sequence[Block]
    folded: bool = False
    bad: bool = False


_KINDS = {str: "text", Table: "table", Figure: "figure", Code: "code", Lines: "lines"}


def render(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page.

    Args:
      title: of the page.
      facts: names and values that stand above the sections.
      sections: those without blocks are left out.
    """
    import jinja2

    template = importlib.resources.files("kdgqa_jax.report").joinpath("page.html")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.from_string(template.read_text("utf-8")).render(
        title=title,
        facts=facts,
        sections=[section for section in sections if section.blocks],
        kind=lambda block: _KINDS[type(block)],
    )
