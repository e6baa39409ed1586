"""What every layer of a model did with a batch of images."""

from typing import Any

import flax.struct
import jax

from kdgqa_jax import tree_utils, vit

Array = jax.Array


@flax.struct.dataclass
class Captured:
    """What every layer of a model did with a batch; L layers, the rest as in attention.py.

    With allocation_scope="example", key_norm, allocation and group_index have a batch axis after
    the layer axis.
    """

    logits: Array  # (B, num_classes) float32
    maps: Array  # (L, B, N, T, S): the attention maps as they were used
    key_norm: Array  # (L, K) float32: the scores of the key heads (`importance`)
    allocation: Array  # (L, K) int32: query heads per key/value head
    group_index: Array  # (L, N) int32: the key/value head of each query head
    outputs: Array  # (L, B, T, N, V): what the query heads give, before norm and projection
    values: Array  # (L, B, S, K, V): the values that the maps weigh
    image_norms: Array  # (L, B, K) float32: Frobenius norm of each image's keys


def capture(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    images: Array,
    mask: Array | None = None,
) -> Captured:
    """Run a model in evaluation and keep what its layers computed. Works under `jit`.

        seen = analysis.capture(model, variables, images)
        seen.maps[3, 0, 5]     # layer 3, image 0, query head 5: (T, S), rows sum to one
        seen.allocation[3]     # how many query heads each key/value head of layer 3 serves

    Args:
      model: any variant, layers scanned or not.
      variables: {"params": ...} and, for DGQA, "norm_stats".
      images: (B, height, width, channels) float, normalised.
      mask: (B,) bool, False for padded images.
    """
    logits, collections = vit.apply_in_evaluation(
        model, variables, images, mask, collect=["intermediates"]
    )
    seen = tree_utils.stack_layers(collections["intermediates"])["blocks"]["attn"]
    return Captured(logits=logits, **seen, **tree_utils.grouping_of(collections))
