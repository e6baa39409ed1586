"""Where the time of a step goes, by kind of operation, from a trace of the profiler."""

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

from jax.profiler import ProfileData

from kdgqa_jax import aot

KINDS: tuple[tuple[str, str], ...] = (
    ("augmentation", r"/augmentation/"),
    ("optimizer", r"/optimizer/"),
    ("linear layers", r"/(query|key|value|out|fc1|fc2|gate|patch_embed|head)/"),
    ("norms", r"/(norm|norm1|norm2|norm_pre|patch_norm|fc_norm|q_norm|k_norm)/"),
    ("attention", r"/attn/"),
    ("activation", r"/mlp/"),
)
"""Kinds of operations, by the names that the model gives them; the first that matches counts."""

MOVING = "copies and slices"
OTHER = "other"

_ARRANGES = {
    *("bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "iota"),
    *("dynamic-update-slice", "pad", "parameter", "reshape", "slice", "transpose"),
}
"""Operations that compute nothing."""


def read(folder: str | os.PathLike, program: str) -> dict[str, float]:
    """Seconds by kind of operation, most first, of all executions in the newest trace of a folder.

    Where operations run at once, the time is shared between them. XLA hands products to threads
    that record nothing on CPUs: time without an operation is that of the product begun last.
    {} where the trace names no operations of the program, as it may on accelerators.

    Args:
      folder: of `jax.profiler.trace`.
      program: the text of the compiled program.
    """
    kinds, products = {}, set()
    for operation, fused in aot.operations(program):
        kinds[operation.id] = _kind(operation, fused)
        if any(o.kind in ("dot", "convolution") for o in (operation, *fused)):
            products.add(operation.id)
    files = pathlib.Path(folder).rglob("*.xplane.pb")
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    spans = [
        span
        for plane in ProfileData.from_file(os.fspath(newest)).planes
        for line in plane.lines
        for span in _exclusive(line.events)
        if span[2] in kinds
    ]
    return {kind: 1e-9 * time for kind, time in _shared(spans, kinds, products).items()}


def _shared(
    spans: list[tuple[float, float, str]], kinds: dict[str, str], products: set[str]
) -> dict[str, float]:
    """Time by kind, most first, of (start, end, name): see `read`."""
    moments = sorted({moment for span in spans for moment in span[:2]})
    place = {moment: i for i, moment in enumerate(moments)}
    running: list[list[str]] = [[] for _ in moments]
    for start, end, name in spans:
        for i in range(place[start], place[end]):
            running[i].append(name)
    times: collections.Counter[str] = collections.Counter()
    product = ""
    for i, names in enumerate(running[:-1]):
        product = next((name for name in names if name in products), product)
        for name in names or [product]:
            share = (moments[i + 1] - moments[i]) / len(names or [product])
            times[kinds.get(name, OTHER)] += share
    return dict(times.most_common())


def _kind(operation: aot.Operation, fused: list[aot.Operation]) -> str:
    parts = fused or [operation]
    if all(o.kind in _ARRANGES or not any(shape for _, shape in o.shapes) for o in parts):
        return MOVING
    names = [f"{o.name}/" for o in (operation, *reversed(fused))]
    found = (kind for name in names for kind, pattern in KINDS if re.search(pattern, name))
    return next(found, OTHER)


def _exclusive(events: Iterable) -> Iterator[tuple[float, float, str]]:
    """(start, end, name) in nanoseconds of the time in which an event has no event inside."""
    ordered = sorted((e.start_ns, -e.duration_ns, e.name) for e in events)
    around: list[tuple[float, str]] = []  # (end, name)
    since = 0.0
    for start, duration, name in [*ordered, (float("inf"), 0.0, "")]:
        while around and around[-1][0] <= start:
            end, inner = around.pop()
            if since < end:
                yield since, end, inner
            since = max(since, end)
        if around and since < start:
            yield since, start, around[-1][1]
        around.append((start - duration, name))
        since = start
