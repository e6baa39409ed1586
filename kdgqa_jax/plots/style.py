"""What all plots share: colours, sizes of texts, grids of panels, files that repeat exactly."""

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

from kdgqa_jax import paths, workdir

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d")
"""Readers with any kind of colour vision can tell them apart (Okabe and Ito, 2008)."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")

GREY = "#767676"

_SETTINGS = {
    "svg.hashsalt": "kdgqa",  # ids of elements, which are random without
    "svg.fonttype": "path",  # looks the same wherever it is opened
    "text.parse_math": False,  # names hold anything
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "figure.titlesize": 11,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def styled(plot: Callable[..., Any]) -> Callable[..., Any]:
    """A function that draws a figure, in the style of all plots."""

    @functools.wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        with _style():
            return plot(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which makes room for its texts by itself."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    return Figure(figsize=(width, height), layout="constrained")


def panels(
    count: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Any, list[Any]]:
    """(figure, `count` axes in rows of at most `columns`); width and height of one, in inches.

    `options` are those of matplotlib's `subplots`.
    """
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = new_figure(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, list(axes[:count])


def cycled(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the line or point with this number."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index // len(COLORS) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


# --- as files -------------------------------------------------------------------------------------


def _bytes(figure: Any, kind: str) -> bytes:
    """The content of a file, the same whenever it is made."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def save(figure: Any, folder: paths.Path, name: str) -> bytes:
    """Write `folder`/NAME.png and NAME.svg; the content of the latter.

    Raises UserError where that is not possible.
    """
    for kind in ("png", "svg"):
        content = _bytes(figure, kind)
        with workdir.written_file(folder / f"{name}.{kind}") as path:
            path.write_bytes(content)
    return content
