"""What the encoders of encoder_table.py compute, in JAX, with as many key/value heads as one likes.

B  batch    T  tokens    D  model width    N  query heads    K  key/value heads    H  head width
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax.convert.encoder_table import ACTIVATIONS as NAMES
from kdgqa_jax.convert.encoders import Encoder
from kdgqa_jax.kernels import grouped_attention
from kdgqa_jax.layers import ACTIVATIONS, gelu

Array = jax.Array
Dense = dict[str, Any]


def _norm(x: Array, norm: Dense, epsilon: float) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred / jnp.sqrt(variance + epsilon) * norm["scale"] + norm["bias"]


def _dense(x: Array, layer: Dense, axes: int = 1) -> Array:
    return jnp.tensordot(x, layer["kernel"], axes) + layer.get("bias", 0.0)


# --- embeddings ---------------------------------------------------------------------------------


def _bert(encoder: Encoder, ids: np.ndarray, positions: np.ndarray | None = None) -> Array:
    positions = np.arange(ids.shape[1]) if positions is None else positions
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    word, position, kind = (encoder.array(f"embeddings.{name}.weight") for name in names)
    norm = encoder.norm(encoder.architecture.embedding_norm)
    return _norm(jnp.asarray(word[ids] + position[positions] + kind[0]), norm, encoder.epsilon)


def _roberta(encoder: Encoder, ids: np.ndarray) -> Array:
    """As BERT's, but positions are counted over real tokens, from behind the padding's own."""
    padding = encoder.config["padding"]
    real = ids != padding
    return _bert(encoder, ids, padding + np.cumsum(real, axis=1) * real)


def _clip(encoder: Encoder, ids: np.ndarray) -> Array:
    token = encoder.array("embeddings.token_embedding.weight")
    position = encoder.array("embeddings.position_embedding.weight")
    return jnp.asarray(token[ids] + position[: ids.shape[1]])


def _whisper(encoder: Encoder, features: np.ndarray) -> Array:
    """Two convolutions over time: (B, mel bins, frames) -> (B, frames / 2, D)."""
    x = jnp.asarray(features, jnp.float32)
    for name, stride in (("conv1", 1), ("conv2", 2)):
        weight = encoder.array(f"{name}.weight")  # (out, in, 3)
        x = jax.lax.conv_general_dilated(x, weight, (stride,), [(1, 1)])
        x = gelu(x + encoder.array(f"{name}.bias")[:, None])
    return x.swapaxes(1, 2) + encoder.array("embed_positions.weight")


EMBEDDINGS: dict[str, Callable[[Encoder, np.ndarray], Array]] = {
    "bert": _bert,
    "roberta": _roberta,
    "clip": _clip,
    "whisper": _whisper,
}
"""By name: inputs -> (B, T, D) float32."""


# --- layers -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("post_norm", "activation", "epsilon"))
def _layer(
    x: Array,
    mask: Array,
    attention: dict[str, Dense],
    rest: dict[str, Dense],
    *,
    post_norm: bool,
    activation: str,
    epsilon: float,
) -> tuple[Array, Array]:
    """(output BTD, what attention saw BTD)."""

    def norm(number: int, x: Array) -> Array:
        return _norm(x, rest[f"norm{number}"], epsilon)

    def mlp(x: Array) -> Array:
        return _dense(ACTIVATIONS[activation](_dense(x, rest["fc1"])), rest["fc2"])

    def attend(x: Array) -> Array:
        query, key, value = (_dense(x, attention[part]) for part in ("query", "key", "value"))
        return _dense(grouped_attention(query, key, value, mask=mask), attention["out"], axes=2)

    if post_norm:
        y = norm(1, x + attend(x))
        return norm(2, y + mlp(y)), x
    seen = norm(1, x)
    x = x + attend(seen)
    return x + mlp(norm(2, x)), seen


Layers = Sequence[tuple[dict[str, Dense], dict[str, Dense]]]
"""Of every layer: its attention as `merging.Attention`, and `Encoder.rest`; on the device."""


def layers_of(
    encoder: Encoder, attention: Sequence[dict[str, Dense]] | None = None
) -> list[tuple[dict[str, Dense], dict[str, Dense]]]:
    """`Layers` of an encoder, with its own attention or with that given: of K key/value heads."""
    attention = attention or [encoder.attention(i) for i in range(encoder.depth)]
    pairs = [(layer, encoder.rest(i)) for i, layer in enumerate(attention)]
    return jax.device_put(jax.tree.map(np.float32, pairs))


def hidden_states(
    encoder: Encoder,
    layers: Layers,
    inputs: np.ndarray,
    mask: np.ndarray | None,
    watch: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """The last hidden states of an encoder, as transformers calls them.

    Args:
      encoder: it.
      layers: as `layers_of` gives them.
      inputs: token ids (B, T) int, or features (B, mel bins, frames) float.
      mask: (B, T) bool, False for padding; None: there is none.
      watch: gets, layer by layer, its number and what its attention saw, (B, T, D) float32.

    Returns:
      (B, T, D) float32; what stands at padding means nothing.
    """
    row = encoder.architecture
    with jax.default_matmul_precision("highest"):
        x = EMBEDDINGS[row.embedding](encoder, inputs)
        length = x.shape[1]
        mask = np.ones((1, length), bool) if mask is None else mask
        seen = np.asarray(mask, bool)[:, None, None, :]  # by every token
        if row.causal:
            seen = seen & np.tri(length, dtype=bool)
        for i, (attention, rest) in enumerate(layers):
            x, y = _layer(
                x,
                seen,
                attention,
                rest,
                post_norm=row.post_norm,
                activation=NAMES[encoder.config["activation"]],
                epsilon=encoder.epsilon,
            )
            if watch is not None:
                watch(i, np.asarray(y))
        if row.final_norm:
            x = _norm(x, encoder.norm(row.final_norm), encoder.epsilon)
    return np.asarray(x)
