"""Text and audio encoders of Hugging Face transformers, as a directory holds them.

    B  batch    T  tokens    D  model width    N  query heads    H  width of one head

encoder_table.py says what transformers calls the parts of each; encoder_forward.py computes them,
encoder_inputs.py makes what they take, and merging_encoder.py gives them fewer key/value heads.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from kdgqa_jax import storage
from kdgqa_jax.convert.encoder_table import ACTIVATIONS, ARCHITECTURES, Architecture
from kdgqa_jax.convert.formats import Arrays, first_line, read_arrays
from kdgqa_jax.errors import UserError, one_line, unknown

WEIGHTS = "model.safetensors"


@dataclasses.dataclass
class Encoder:
    """An encoder in a directory.

    Attributes:
      folder: the directory.
      kind: a name in `ARCHITECTURES`.
      arrays: all arrays of the directory, by their names there.
      prefix: in front of the names of the encoder.
      config: our names of `Architecture.fields` -> values.
    """

    folder: pathlib.Path
    kind: str
    arrays: Arrays
    prefix: str
    config: dict[str, Any]

    @property
    def architecture(self) -> Architecture:
        """Its row."""
        return ARCHITECTURES[self.kind]

    @property
    def epsilon(self) -> float:
        """Of all norms."""
        return float(self.config["epsilon"])

    @property
    def depth(self) -> int:
        """L."""
        name, depth = self.name_of("query"), 0
        while f"{self.prefix}{name.format(depth)}.weight" in self.arrays:
            depth += 1
        return depth

    def name_of(self, part: str) -> str:
        """The name of a part of a layer, with {} for the number of the layer."""
        return self.architecture.layer + self.architecture.names[part]

    def array(self, name: str) -> np.ndarray:
        """An array by its name behind the prefix, float32. Raises UserError if it is not there."""
        if self.prefix + name not in self.arrays:
            raise UserError(f"{self.folder / WEIGHTS}: holds no {self.prefix + name}")
        return np.asarray(self.arrays[self.prefix + name], np.float32)

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """A LayerNorm: "scale" and "bias", (D,) each; those of TensorFlow's names, too."""
        old = f"{self.prefix}{name}.gamma" in self.arrays
        leaves = ("gamma", "beta") if old else ("weight", "bias")
        return {
            k: self.array(f"{name}.{x}") for k, x in zip(("scale", "bias"), leaves, strict=True)
        }

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """A linear layer: "kernel" (in, out), and "bias" (out,) if there is one."""
        layer = {"kernel": self.array(f"{name}.weight").T}
        if f"{self.prefix}{name}.bias" in self.arrays:
            layer["bias"] = self.array(f"{name}.bias")
        return layer

    def attention(self, i: int) -> dict[str, dict[str, np.ndarray]]:
        """The attention of layer i, as `merging.merge_heads` takes it; J = N."""
        heads, layer = self.config["num_heads"], {}
        for part in ("query", "key", "value", "out"):
            dense = self.dense(self.name_of(part).format(i))
            kernel = dense["kernel"]
            if part == "out":
                shape = (heads, -1, kernel.shape[1])
            else:
                shape = (kernel.shape[0], heads, -1)
                if "bias" in dense:
                    dense["bias"] = dense["bias"].reshape(heads, -1)
            layer[part] = {**dense, "kernel": kernel.reshape(shape)}
        return layer

    def rest(self, i: int) -> dict[str, dict[str, np.ndarray]]:
        """Norms and MLP of layer i."""
        norms = {part: self.norm(self.name_of(part).format(i)) for part in ("norm1", "norm2")}
        return norms | {part: self.dense(self.name_of(part).format(i)) for part in ("fc1", "fc2")}

    def input_norm(self, i: int) -> dict[str, np.ndarray]:
        """The norm whose result the attention of layer i sees."""
        if not self.architecture.post_norm:
            return self.norm(self.name_of("norm1").format(i))
        if i == 0:
            return self.norm(self.architecture.embedding_norm)
        return self.norm(self.name_of("norm2").format(i - 1))

    def arrays_of(self, i: int, attention: dict[str, dict[str, np.ndarray]]) -> Arrays:
        """Arrays of the directory for the attention of layer i with K key/value heads.

        These architectures have no grouped heads: each shared head is there for every query head
        that it serves. Names and dtypes are those that there are.

        Raises UserError: numbers too large for the dtype.
        """
        heads, arrays = self.config["num_heads"], {}
        for part, dense in attention.items():
            name = self.prefix + self.name_of(part).format(i)
            for leaf, x in dense.items():
                if part in ("key", "value"):
                    x = np.repeat(x, heads // x.shape[-2], axis=-2)
                old = f"{name}.{'weight' if leaf == 'kernel' else 'bias'}"
                there = self.arrays[old]
                x = x.reshape(there.shape[::-1]).T if leaf == "kernel" else x.reshape(there.shape)
                arrays[old] = _cast(old, x, there.dtype)
        return arrays


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(x.astype(dtype))
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise UserError(f"{name} gets numbers too large for {dtype}; save the model in float32")
    return narrow


def read(source: str) -> Encoder:
    """Read a directory that transformers has written.

    Raises UserError: no such directory, weights of another kind than model.safetensors, an encoder
    that is not in `ARCHITECTURES` or computes something else, arrays that are missing.
    """
    folder = storage.fetched(source, "source")
    if not folder.is_dir():
        raise UserError(f"source {source} is not a directory; give one that transformers has saved")
    stated = _config(folder)
    kind = stated.get("model_type")
    if kind not in ARCHITECTURES:
        raise unknown(f"architecture of {folder}, model_type", kind, ARCHITECTURES)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder}: holds no {WEIGHTS}; load it in transformers and save it again:"
            " model.save_pretrained(DIR, max_shard_size='100GB')"
        )
    row = ARCHITECTURES[kind]
    section = stated.get(row.section, {}) if row.section else stated
    if not isinstance(section, dict):
        raise UserError(f"{folder / 'config.json'}: {row.section} is no JSON object")
    for name, value in row.expected.items():
        if section.get(name, value) != value:
            shown = one_line(repr(section[name]), 80)
            raise UserError(f"{folder}: {name}={shown} is not supported; expected {value!r}")
    config = {}
    for ours, (name, default) in row.fields.items():
        there = section.get(name)
        config[ours] = default if there is None else there
    arrays, _ = read_arrays(folder / WEIGHTS)
    prefix = _prefix(folder, row, arrays)
    encoder = Encoder(folder, kind, arrays, prefix, config)
    _check(encoder)
    return encoder


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(stated, dict):
        raise UserError(f"{path}: expected a JSON object")
    return stated


def _prefix(folder: pathlib.Path, row: Architecture, arrays: Arrays) -> str:
    first = f"{row.layer}{row.names['query']}.weight".format(0)
    for prefix in row.prefixes:
        if prefix + first in arrays:
            return prefix
    names = " or ".join(prefix + first for prefix in row.prefixes)
    raise UserError(f"{folder / WEIGHTS}: holds no layers of an encoder; expected {names}")


def _check(encoder: Encoder) -> None:
    """Raise UserError for a config that does not fit the arrays, or numbers that are none."""
    heads, activation = encoder.config["num_heads"], encoder.config["activation"]
    if activation not in ACTIVATIONS:
        raise unknown(f"activation of {encoder.folder}", activation, ACTIVATIONS)
    shape = encoder.array(encoder.name_of("query").format(0) + ".weight").shape
    if len(shape) != 2 or not isinstance(heads, int) or heads < 1 or shape[0] % heads:
        raise UserError(
            f"{encoder.folder}: queries of shape {shape} are not those of {heads} heads, which"
            " config.json says"
        )
    for i in range(encoder.depth):
        for part in ("query", "key", "value", "out"):
            name = encoder.name_of(part).format(i)
            dense = encoder.dense(name)
            kernel = shape if part == "out" else shape[::-1]
            expected = {"kernel": kernel, "bias": kernel[1:]}
            if any(x.shape != expected[leaf] for leaf, x in dense.items()):
                raise UserError(
                    f"{encoder.folder / WEIGHTS}: {name} does not fit queries of shape {shape}"
                )
            if not all(np.isfinite(x).all() for x in dense.values()):
                raise UserError(f"{encoder.folder / WEIGHTS}: NaN or infinity in {name}")
