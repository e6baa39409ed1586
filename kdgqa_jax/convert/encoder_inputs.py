"""Inputs that calibrate the merging of an encoder: texts, token ids, or features of sound.

B  batch    T  tokens    n  inputs
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdgqa_jax import extras, storage
from kdgqa_jax.convert.encoders import Encoder
from kdgqa_jax.convert.formats import first_line
from kdgqa_jax.errors import UserError

Batch = tuple[np.ndarray, np.ndarray | None]
"""(token ids (B, T) int, mask (B, T) bool), or (features (B, mel bins, frames) float, None)."""

BATCH = 16


def read(place: str, encoder: Encoder, count: int = 512, seed: int = 0) -> list[Batch]:
    """At most `count` inputs of a file, in batches.

    Args:
      place: a .txt file with a text in each line, for which the encoder's directory needs
        tokenizer.json; or a .npy file that `batches` takes.
      encoder: whom they are for.
      count: how many; all, where there are no more.
      seed: of the choice, which depends on nothing else.

    Raises:
      UserError: a file of another kind, or one that cannot be read; inputs that do not fit.
    """
    path = storage.fetched(place, "calibration file")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".npy"):
        raise UserError(
            f"calibration file {place}: expected .txt with a text in each line, or .npy with"
            f" {encoder.architecture.takes}"
        )
    try:
        if suffix == ".npy":
            inputs = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(inputs, np.ndarray) or not inputs.ndim:
                raise ValueError("no array of inputs")
            return batches(_chosen(inputs, count, seed), encoder, str(place))
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"calibration file {place} cannot be read ({reason})") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"calibration file {place} holds no text; give one in each line")
    return list(_tokenised(_chosen(texts, count, seed), encoder))


def batches(inputs: np.ndarray, encoder: Encoder, name: str = "calibration") -> list[Batch]:
    """Inputs of one length, in batches.

    Args:
      inputs: token ids (n, T) int, padded as the tokenizer does, or for Whisper features (n, mel
        bins, frames) float, as its feature extractor gives them.
      encoder: whom they are for.
      name: what an error calls them.

    Raises:
      UserError: inputs of another kind, shape or range.
    """
    check = _check_ids if encoder.architecture.takes == "token ids" else _check_features
    if not inputs.size:
        raise UserError(f"{name}: holds no inputs; expected {encoder.architecture.takes}, (n, ...)")
    check(inputs, encoder, name)
    parts = (inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH))
    if encoder.architecture.takes == "features":
        return [(np.asarray(part, np.float32), None) for part in parts]
    return [(np.asarray(part), real_tokens(np.asarray(part), encoder)) for part in parts]


def real_tokens(ids: np.ndarray, encoder: Encoder) -> np.ndarray:
    """(B, T) bool: which token ids are no padding.

    BERT and RoBERTa have a token for it. CLIP's texts end with the first end of text; where the
    config calls that 2, as those of the first models wrongly do, it is the largest id.
    """
    if not encoder.architecture.causal:
        return ids != encoder.config["padding"]
    end = encoder.config["end"]
    ends = ids == (ids.max(axis=1, keepdims=True) if end == 2 else end)
    return np.cumsum(ends, axis=1) - ends == 0


def _chosen(inputs: Any, count: int, seed: int) -> Any:
    """Those at the positions that a shuffle by the seed puts first, in their order."""
    first = np.sort(np.random.default_rng(seed).permutation(len(inputs))[:count])
    return inputs[first] if isinstance(inputs, np.ndarray) else [inputs[i] for i in first]


def _check_ids(ids: np.ndarray, encoder: Encoder, name: str) -> None:
    vocabulary, longest = _sizes(encoder)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.shape[1]:
        raise UserError(
            f"{name}: {ids.dtype} {ids.shape}; expected token ids (n, tokens), integers"
        )
    if ids.shape[1] > longest:
        raise UserError(f"{name}: {ids.shape[1]} tokens; the encoder takes at most {longest}")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise UserError(
            f"{name}: token ids from {ids.min()} to {ids.max()}; the encoder knows 0 to"
            f" {vocabulary - 1}"
        )


def _check_features(features: np.ndarray, encoder: Encoder, name: str) -> None:
    bins = encoder.array("conv1.weight").shape[1]
    expected = (bins, 2 * len(encoder.array("embed_positions.weight")))
    if features.dtype.kind != "f" or features.shape[1:] != expected:
        raise UserError(
            f"{name}: {features.dtype} {features.shape}; expected features {('n', *expected)},"
            " floats, as the feature extractor of transformers gives them"
        )
    if not np.isfinite(features).all():
        raise UserError(f"{name}: features hold NaN or infinity; leave those inputs out")


def _sizes(encoder: Encoder) -> tuple[int, int]:
    """(size of the vocabulary, the most tokens of a text)."""
    if encoder.architecture.causal:
        names = ("token_embedding", "position_embedding")
    else:
        names = ("word_embeddings", "position_embeddings")
    vocabulary, longest = (len(encoder.array(f"embeddings.{name}.weight")) for name in names)
    if encoder.architecture.embedding == "roberta":
        longest -= encoder.config["padding"] + 1
    return vocabulary, longest


def _tokenised(texts: list[str], encoder: Encoder) -> Iterator[Batch]:
    """Batches of texts of about one length."""
    if encoder.architecture.takes != "token ids":
        raise UserError(
            f"{encoder.kind} takes no texts; calibrate with a .npy of {encoder.architecture.takes}"
        )
    tokenizer = _tokenizer(encoder.folder / "tokenizer.json")
    vocabulary, longest = _sizes(encoder)
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    ids = sorted((tokenizer.encode(text).ids for text in texts), key=len)
    if not any(ids):
        raise UserError(f"{encoder.folder / 'tokenizer.json'} makes no tokens of the texts")
    filler = encoder.config["end" if encoder.architecture.causal else "padding"]
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        length = max(map(len, rows))
        # Few lengths: each is a program of its own.
        length = min(-(-length // 16) * 16, longest)
        padded = np.full((len(rows), length), min(filler, vocabulary - 1))
        mask = np.arange(length) < np.array([[len(row)] for row in rows])
        padded[mask] = np.concatenate(rows)
        yield padded, mask


def _tokenizer(path: pathlib.Path) -> Any:
    extras.needs("tokenizers", "reading texts", instead="give token ids as .npy")
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(
            f"{path} not found, which texts need; save a fast tokenizer there, or give token ids as"
            " .npy"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # whatever its parser raises
        raise UserError(f"{path}: not a tokenizer that can be read ({first_line(error)})") from None
