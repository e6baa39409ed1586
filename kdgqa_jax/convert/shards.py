"""Weights in several files with an index, as transformers writes large models."""

import json
import pathlib
from typing import Any

from kdgqa_jax import workdir
from kdgqa_jax.convert.formats import Arrays, read_arrays
from kdgqa_jax.errors import UserError, one_line, some

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def is_index(path: pathlib.Path) -> bool:
    """If a file is named as an index is."""
    return path.name.endswith(".index.json")


def read_shards(path: pathlib.Path) -> Arrays:
    """The arrays of all shards that an index names.

    Raises UserError: no index, a shard that is missing, unreadable or outside of the directory, a
    name that is twice there, or names other than those of the index.
    """
    files = _weight_map(path)
    arrays: Arrays = {}
    for file in sorted(set(files.values())):
        shard = path.parent / file
        if not shard.is_file():
            raise UserError(f"{path}: shard {file} is missing; fetch the directory again")
        found, _ = read_arrays(shard)
        twice = found.keys() & arrays.keys()
        if twice:
            raise UserError(f"{path}: {some(sorted(twice))} is in two shards; fetch them again")
        expected = {name for name, where in files.items() if where == file}
        if found.keys() != expected:
            other = some(sorted(found.keys() ^ expected))
            raise UserError(f"{shard}: holds other names than {path.name} says: {other}")
        arrays |= found
    return arrays


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """name of an array -> name of a file beside the index."""
    workdir.read_json(path)  # whatever is wrong with it as JSON
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated.extend(key for key in set(keys) if keys.count(key) > 1)
        return dict(pairs)

    index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    if repeated:
        raise UserError(f"{path}: {some(sorted(repeated))} is there twice; fetch it again")
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: no index of shards; expected names and files under 'weight_map'")
    for name, file in files.items():
        bare = isinstance(file, str) and pathlib.PurePath(file).name == file and "\\" not in file
        if not bare or file == "..":
            raise UserError(
                f"{path}: {one_line(name, 60)} is said to be in {one_line(repr(file), 60)}; a shard"
                " is a file in the directory of its index"
            )
    return files
