"""Fewer key/value heads for a text or audio encoder of Hugging Face transformers.

    merged = convert.merge_encoder("all-MiniLM-L6-v2", 6, calibration="sentences.txt")
    print(merged.report)
    merged.save("minilm_6")      # transformers loads it as it did the source

transformers has no grouped heads in these architectures: what is written holds each shared head
once for every query head that it serves, and computes what grouped heads would.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdgqa_jax import workdir
from kdgqa_jax.convert import encoder_inputs, encoders
from kdgqa_jax.convert.encoder_forward import hidden_states, layers_of
from kdgqa_jax.convert.encoders import WEIGHTS, Encoder
from kdgqa_jax.errors import UserError, unknown
from kdgqa_jax.heads.merging import Merged, merge_heads
from kdgqa_jax.heads.merging_rules import MERGING
from kdgqa_jax.heads.moments import InputMoments, data_free_moments
from kdgqa_jax.heads.pooling import check_groups, pool_heads

RULES = ("mean", *MERGING)

HEADER = ("layer", "keys kept, %", "values kept, %")

OTHER_WEIGHTS = (
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "onnx",
    "openvino",
    "coreml",
    ".git",
    ".cache",
)
"""What a directory holds of the same model otherwise: not copied, as it is not merged."""


@dataclasses.dataclass
class MergedEncoder:
    """An encoder with K key/value heads.

    Attributes:
      source: the encoder as it was.
      attention: of every layer, as `merging.Attention`, float64; J = K.
      merged: of every layer what merging made of it; [] for "mean".
      notes: sentences of the report.
    """

    source: Encoder
    attention: list[dict[str, Any]]
    merged: list[Merged]
    notes: list[str]

    def rows(self) -> list[tuple[str, str, str]]:
        """Cells under `HEADER`: least shares of energy over the groups of each layer."""
        return [
            (str(i), f"{100 * x.keys_kept.min():.2f}", f"{100 * x.values_kept.min():.2f}")
            for i, x in enumerate(self.merged)
        ]

    @property
    def report(self) -> str:
        """Rows and notes as text."""
        rows = [f"layer {i}: {k} % of keys, {v} % of values kept" for i, k, v in self.rows()]
        return "\n".join([*rows, *self.notes])

    def save(self, path: str | os.PathLike) -> None:
        """Write a directory that transformers loads, whole or not at all.

        It holds everything that is in the source's, but for `OTHER_WEIGHTS`.

        Raises:
          UserError: something is there, it cannot be written, or numbers too large for the dtype.
        """
        from safetensors import safe_open
        from safetensors.numpy import save_file

        place, folder = workdir.check_new(path), self.source.folder
        if place.is_relative_to(folder.resolve()):
            raise UserError(f"{place} lies in the source {folder}; choose another place")
        arrays = dict(self.source.arrays)
        for i, layer in enumerate(self.attention):
            arrays |= self.source.arrays_of(i, layer)
        arrays = {name: np.asarray(x, order="C") for name, x in arrays.items()}
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            metadata = file.metadata()
        with workdir.written_whole(place) as partial:
            ignored = shutil.ignore_patterns(*OTHER_WEIGHTS, WEIGHTS)

            def top_level(directory: str, names: list[str]) -> set[str]:
                return ignored(directory, names) if pathlib.Path(directory) == folder else set()

            shutil.copytree(folder, partial, ignore=top_level, dirs_exist_ok=True)
            save_file(arrays, partial / WEIGHTS, metadata)


def merge_encoder(
    source: str | os.PathLike,
    num_kv_heads: int,
    pooling: str = "svd",
    calibration: str | os.PathLike | np.ndarray | None = None,
    *,
    count: int = 512,
    seed: int = 0,
) -> MergedEncoder:
    """Read an encoder and give it fewer key/value heads.

    Args:
      source: a directory that transformers has written, see `encoder_table.ARCHITECTURES`.
      num_kv_heads: K; divides the number of heads. K == N changes nothing.
      pooling: "mean", or a rule of `MERGING`.
      calibration: inputs to merge by: a file, see `encoder_inputs.read`, or an array, see
        `encoder_inputs.batches`. None: without data, by weights and norm scales alone.
      count: at most so many inputs of a file.
      seed: of their choice.

    Raises:
      UserError: what `encoders.read`, `encoder_inputs` and `merge_heads` say, or an unknown rule.
    """
    if pooling not in RULES:
        raise unknown("pooling", pooling, RULES)
    if pooling == "mean" and calibration is not None:
        raise UserError(f"pooling 'mean' takes no calibration; {' and '.join(MERGING)} do")
    encoder = encoders.read(os.fspath(source))
    heads = encoder.config["num_heads"]
    check_groups(heads, num_kv_heads)
    attention = [encoder.attention(i) for i in range(encoder.depth)]
    side = encoder.architecture.side
    what = f"{encoder.kind}{f' ({side})' if side else ''}: {encoder.depth} layers"
    what += f", {heads} to {num_kv_heads} key/value heads"
    if pooling == "mean":
        pooled = [_mean(layer, num_kv_heads) for layer in attention]
        return MergedEncoder(encoder, pooled, [], [f"{what} (mean)", _sizes(encoder, num_kv_heads)])
    moments, by = _moments(encoder, calibration, count, seed)
    merged = [
        merge_heads(layer, num_kv_heads, of_layer, pooling)
        for layer, of_layer in zip(attention, moments, strict=True)
    ]
    notes = [f"{what} ({pooling}), {by}", _sizes(encoder, num_kv_heads)]
    return MergedEncoder(encoder, [x.attention for x in merged], merged, notes)


def _mean(layer: dict[str, Any], num_kv_heads: int) -> dict[str, Any]:
    pooled = {
        part: {leaf: np.asarray(pool_heads(x, num_kv_heads)) for leaf, x in layer[part].items()}
        for part in ("key", "value")
    }
    return {**layer, **pooled}


def _moments(
    encoder: Encoder, calibration: Any, count: int, seed: int
) -> tuple[Sequence[InputMoments], str]:
    """Of what the attention of every layer sees, and how they came about."""
    if calibration is None:
        norms = (encoder.input_norm(i) for i in range(encoder.depth))
        return [data_free_moments(**norm) for norm in norms], "without data, by norm scales"
    if isinstance(calibration, np.ndarray):
        batches = encoder_inputs.batches(calibration, encoder)
    else:
        batches = encoder_inputs.read(os.fspath(calibration), encoder, count, seed)
    layers = layers_of(encoder)
    width = layers[0][0]["query"]["kernel"].shape[0]
    moments = [InputMoments.empty(width) for _ in layers]
    for inputs, mask in batches:

        def add(i: int, x: np.ndarray, mask: np.ndarray | None = mask) -> None:
            moments[i] += InputMoments.of(x, mask)

        hidden_states(encoder, layers, inputs, mask, add)
    tokens = int(moments[0].tokens)
    inputs = sum(len(inputs) for inputs, _ in batches)
    return moments, f"calibrated with {inputs:,} inputs ({tokens:,} tokens)"


def _sizes(encoder: Encoder, num_kv_heads: int) -> str:
    sizes = [x.size for i in range(encoder.depth) for x in _keys_and_values(encoder, i)]
    there, all_of_them = sum(sizes), sum(x.size for x in encoder.arrays.values())
    fewer = there * num_kv_heads // encoder.config["num_heads"]
    return (
        f"the files are as large as before: transformers has no grouped heads for"
        f" {encoder.kind}, so every query head has its own copy; in a framework that has, key and"
        f" value projections are {fewer:,} parameters instead of {there:,} (of {all_of_them:,})"
    )


def _keys_and_values(encoder: Encoder, i: int) -> list[np.ndarray]:
    layer = encoder.attention(i)
    return [x for part in ("key", "value") for x in layer[part].values()]
