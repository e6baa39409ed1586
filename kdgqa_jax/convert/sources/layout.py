"""What a source of checkpoints says about itself: its names, its form of arrays, its facts.

Our names are paths such as `blocks_3/attn/query/kernel`; `{i}` stands for the number of a block.
A source is one file with one or more `Layout`s; `sources.LAYOUTS` is the table.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from kdgqa_jax.convert.formats import Arrays
from kdgqa_jax.convert.sources.stated import Stated

# --- how arrays differ --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transform:
    """Between an array of PyTorch and ours; `read` also gets the width of a head."""

    how: str
    read: Callable[[np.ndarray, int], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


_SAME = Transform("", lambda x, _: x, lambda x: x)
_ATTENTION = r"(.*/attn|attn_pool)"

_PYTORCH: dict[str, Transform] = {
    r"patch_embed/kernel": Transform(  # (D, C, P, P) and (P, P, C, D)
        "channels last", lambda x, _: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    ),
    rf"{_ATTENTION}/(query|key|value)/kernel": Transform(  # (heads * H, D) and (D, heads, H)
        "transposed, by head",
        lambda x, width: x.T.reshape(x.shape[1], -1, width),
        lambda x: x.reshape(len(x), -1).T,
    ),
    rf"{_ATTENTION}/(query|key|value)/bias": Transform(  # (heads * H,) and (heads, H)
        "by head", lambda x, width: x.reshape(-1, width), lambda x: x.reshape(-1)
    ),
    rf"{_ATTENTION}/out/kernel": Transform(  # (D, N * H) and (N, H, D)
        "transposed, by head",
        lambda x, width: x.T.reshape(-1, width, len(x)),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
    r".*/kernel": Transform("transposed", lambda x, _: x.T, lambda x: x.T),  # (out, in), (in, out)
    r".*": _SAME,
}
"""By our name; the first row that matches."""

_ORDINALS = ("first", "second", "third")


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of an array of a file that are one of ours."""

    number: int
    count: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """Those rows. Raises ValueError where the rows cannot be shared out."""
        return np.split(array, self.count)[self.number]

    def __str__(self) -> str:
        last = self.number == self.count - 1
        return f"{'last' if last else _ORDINALS[self.number]} {('half', 'third')[self.count - 2]}"


# --- surgery ------------------------------------------------------------------------------------


class Bench:
    """The arrays of a file by canonical name, on which a source operates before they are read.

    An operation that the shapes do not allow is left out: the names then do not fit the layout, and
    whoever compares them says so.

    Attributes:
      arrays: by name.
      origins: of an array that an operation made: the name in the file, and what was done.
    """

    def __init__(self, arrays: Arrays):
        self.arrays = dict(arrays)
        self.origins: dict[str, tuple[str, str]] = {}

    def get(self, name: str, rank: int) -> np.ndarray | None:
        """An array of so many axes; None if there is none."""
        array = self.arrays.get(name)
        return array if array is not None and array.ndim == rank and array.size else None

    def put(self, name: str, array: np.ndarray, source: str, how: str) -> None:
        """An array made from the one that the file calls `source`."""
        before, done = self.origins.get(source, (source, ""))
        self.arrays[name] = array
        self.origins[name] = (before, "; ".join(x for x in (done, how) if x))

    def matches(self, pattern: str) -> list[re.Match]:
        """The names that a pattern matches as a whole, in order."""
        return [match for name in list(self.arrays) if (match := re.fullmatch(pattern, name))]


def fold_class_position(bench: Bench, token: str, position: str) -> None:
    """Positions of class token and patches -> those of the patches; the class token has its own.

    Both are added to the residual stream once, so their sum is the same function. It is what timm
    makes of models whose registers have no position.
    """
    cls, pos = bench.get(token, 3), bench.get(position, 3)
    if cls is not None and pos is not None and cls.shape[1:] == (1, pos.shape[2]):
        bench.put(token, cls + pos[:, :1], token, "its position added")
        bench.put(position, pos[:, 1:], position, "without that of the class token")


def bias_free_head(bench: Bench, projection: str, head: str, transposed: bool = False) -> None:
    """A projection without a bias -> a head whose bias is zero."""
    kernel = bench.get(projection, 2)
    if kernel is not None:
        kernel = kernel.T if transposed else kernel
        bias = np.zeros(len(kernel), kernel.dtype)
        bench.put(f"{head}.weight", kernel, projection, "transposed" if transposed else "")
        bench.put(f"{head}.bias", bias, projection, "zero: the projection has no bias")
        if projection != f"{head}.weight":
            del bench.arrays[projection]


# --- layouts ------------------------------------------------------------------------------------


def _says_nothing(config: dict[str, Any], place: str) -> Stated:
    return Stated(place, {})


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and array forms of one framework, and what it says of a model.

    Attributes:
      title: of the framework.
      names: our module or array -> theirs; "#j/n": the j-th of n equal parts of the rows of theirs.
      pytorch: arrays are in PyTorch's form and leaves are called weight and bias; otherwise arrays
        and leaves are as ours.
      renames: (pattern, replacement) applied to the names of a file before they are looked up.
      ignored: patterns of canonical names that belong to no ViT (a text tower, a decoder).
      surgery: makes the arrays that `names` has from those that a file has.
      closing: makes the arrays that a file has from those that `names` has.
      stated: (config.json, what errors call it) -> what it says of the model.
      fixed: options of `vit.create` that all models of this layout have.
      defaults: those that weights do not show, where nothing beside them says so.
      gated_defaults: the same, of models with gated MLPs.
      needs: options that weights do not show and that differ between models of this layout.
      only_plain: names alone show a plain ViT; whatever else they show fits several models.
      config_file: what lies beside the weights and says of the model.
      resize: how the framework resizes position embeddings, a name in `resizing.RESIZING`.
      resize_with_registers: that of models with registers, where it is another one.
      any_size: the framework resizes them for the images that come.
    """

    title: str
    names: Mapping[str, str]
    pytorch: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    surgery: Callable[[Bench], None] = lambda bench: None
    closing: Callable[[Arrays], Arrays] = lambda arrays: arrays
    stated: Callable[[dict[str, Any], str], Stated] = _says_nothing
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gated_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    only_plain: bool = False
    config_file: str = "config.json"
    resize: str = "timm"
    resize_with_registers: str = ""
    any_size: bool = False

    def canonical(self, name: str) -> str:
        """The name of an array of a file as `names` has it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def theirs(self, ours: str) -> tuple[str, Part | None] | None:
        """(name, part or None) of one of our arrays; None if the layout does not have it."""
        number = re.match(r"blocks_(\d+)/", ours)
        general = re.sub(r"^blocks_\d+/", "blocks_{i}/", ours)
        if general in self.names:
            name = self.names[general]
        else:
            module, _, leaf = general.rpartition("/")
            if module not in self.names:
                return None
            if self.pytorch:
                leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
            base, mark, part = self.names[module].partition("#")
            name = f"{base}{'.' if self.pytorch else '/'}{leaf}{mark}{part}"
        name, _, part = name.replace("{i}", number[1] if number else "").partition("#")
        return name, Part(*map(int, part.split("/"))) if part else None

    def transform(self, ours: str) -> Transform:
        """How the array is changed on the way in and out."""
        if not self.pytorch:
            return _SAME
        return next(t for pattern, t in _PYTORCH.items() if re.fullmatch(pattern, ours))

    def block_numbers(self, names: Iterable[str]) -> set[int]:
        """The numbers of the blocks whose attention has an array among `names`."""
        pattern = re.escape(self.names["blocks_{i}/attn/query"].partition("#")[0])
        pattern = pattern.replace(r"\{i\}", r"(\d{1,4})")
        found = (re.match(pattern, name) for name in names)
        return {int(match[1]) for match in found if match}

    def ignores(self, name: str) -> bool:
        """If a canonical name belongs to no ViT."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def bench(self, arrays: Arrays) -> Bench:
        """The arrays of a file by canonical name, operated on."""
        bench = Bench({self.canonical(name): x for name, x in arrays.items()})
        self.surgery(bench)
        return bench


def numbered(block: str, names: Mapping[str, str]) -> dict[str, str]:
    """Rows of `Layout.names` for what is in a block, which they call `block`."""
    return {f"blocks_{{i}}/{ours}": f"{block}.{theirs}" for ours, theirs in names.items()}
