"""Predictions of a model directory: logits or features of arrays, top classes of image files."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import checkpoint, paths, storage, tree_utils, vit, workdir
from kdgqa_jax.data import images as image_files
from kdgqa_jax.errors import UserError, one_line, unknown

Array = jax.Array


# --- predicting ---------------------------------------------------------------------------------


def _tokens(model: vit.VisionTransformer, images: Array, mask: Array | None = None) -> Array:
    return model.features(images, mask=mask).astype(jnp.float32)


def _pooled(model: vit.VisionTransformer, images: Array, mask: Array | None = None) -> Array:
    return model.pooled(model.features(images, mask=mask)).astype(jnp.float32)


FEATURES: dict[str, Callable[..., Array]] = {
    "pooled": _pooled,
    "tokens": _tokens,
}
"""What can be asked for in place of logits, float32.

Pooled (n, D): what the class head gets (or the layer `pre_logits` before it). Tokens (n, T, D): all
of them after the last block, and after the final norm where that is theirs.
"""


@flax.struct.dataclass
class Predictions:
    """n images; L layers, K key/value heads."""

    # float32: logits (n, num_classes); of a model without a head pooled features (n, D); or what
    # was asked for in `FEATURES`.
    output: np.ndarray
    # Query heads per key/value head: (batches, L, K) int32, or (n, L, K) in example scope.
    allocation: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """The output, where nothing else was asked for."""
        return self.output


def _step(
    model: vit.VisionTransformer,
    features: str | None,
    variables: dict[str, Any],
    images: Array,
    mask: Array,
) -> tuple[Array, Array]:
    method = FEATURES[features] if features else None
    output, collections = vit.apply_in_evaluation(model, variables, images, mask, method=method)
    return output, tree_utils.grouping_of(collections)["allocation"]


def predict_batches(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    batches: Iterable[np.ndarray],
    batch_size: int,
    features: str | None = None,
) -> Predictions:
    """Predictions for batches of at most `batch_size` images; one compilation.

    Smaller batches are padded and masked, so that padding changes no prediction. In batch scope the
    grouping of `kdgqa`, and so its logits, depends on which images share a batch.

    Args:
      model: any variant.
      variables: {"params": ..., and for DGQA "norm_stats": ...}.
      batches: (n, height, width, channels) float32 each, normalised.
      batch_size: the largest n.
      features: a name in `FEATURES`; None: logits, or what a model without a head gives.

    Raises:
      UserError: an unknown name.
    """
    if features is not None and features not in FEATURES:
        raise unknown("features", features, FEATURES)
    step = jax.jit(_step, static_argnums=(0, 1))
    outputs, allocations = [], []
    for images in batches:
        count = len(images)
        padded = np.pad(images, [(0, batch_size - count)] + [(0, 0)] * (images.ndim - 1))
        found, allocation = jax.device_get(
            step(model, features, variables, jnp.asarray(padded), jnp.arange(batch_size) < count)
        )
        outputs.append(found[:count])
        allocations += tree_utils.allocations_by_batch(allocation, count)
    return Predictions(np.concatenate(outputs), np.stack(allocations))


def predict_array(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    images: np.ndarray,
    batch_size: int = 256,
    features: str | None = None,
) -> Predictions:
    """Predictions for (n, height, width, channels) float32 images, normalised; n at least 1.

    `features` as for `predict_batches`. Raises UserError: no images, some that are not finite, or
    unknown features.
    """
    if not len(images):
        raise UserError("there are no images to predict: the array is empty")
    _check_finite(images)
    batch_size = min(batch_size, len(images))
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return predict_batches(model, variables, batches, batch_size, features)


def _check_finite(images: np.ndarray) -> None:
    """Raise UserError if an image holds NaN or infinity, which would regroup its batch mates."""
    bad = [i for i, image in enumerate(images) if not np.isfinite(image).all()]
    if bad:
        more = ", ..." if len(bad) > 8 else ""
        raise UserError(
            f"{len(bad)} of {len(images)} images hold NaN or infinity (at index"
            f" {', '.join(map(str, bad[:8]))}{more}); leave them out, or mend them"
        )


def read_array(path: pathlib.Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The images in a .npy file, in either byte order and any layout.

    Raises UserError unless they are float32 NHWC of that (height, width, channels).
    """
    try:
        images = np.load(path, allow_pickle=False)
    except Exception as error:  # a parser of damaged files raises anything
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"{path}: not a NumPy array that can be read ({reason})") from None
    if isinstance(images, np.ndarray):
        images = images.astype(images.dtype.newbyteorder("="), copy=False)
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4:
        what = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else "an archive"
        raise UserError(
            f"{path}: {what}; expected normalised float32 images (n, height, width, channels)"
        )
    if images.shape[1:] != image_shape or not len(images):
        raise UserError(f"{path}: images {images.shape}; the model takes {('n', *image_shape)}")
    return images


def predict_files(
    directory: str | os.PathLike,
    places: Sequence[str | os.PathLike],
    batch_size: int = 256,
    features: str | None = None,
    needs_classes: bool = False,
) -> tuple[list[str], Predictions, list[str]]:
    """(names of the images, predictions, class names) for a .npy file, or image files and folders.

    Args:
      directory: a model directory.
      places: one .npy file of normalised float32 NHWC images, or image files and folders, which are
        prepared as the model directory says.
      batch_size: images per batch.
      features: as for `predict_batches`.
      needs_classes: refuse a model without a class head, before any image is read.

    Raises:
      UserError: no model there, images that cannot be read or do not fit, unknown features.
    """
    model, variables, description = checkpoint.load_model(directory)
    classes = description["class_names"]
    if needs_classes:
        check_classes(classes)
    shape = (*model.image_shape, description["channels"])
    names, batches, size = read_batches(places, shape, description["preprocessing"], batch_size)
    return names, predict_batches(model, variables, batches, size, features), classes


def read_batches(
    places: Sequence[str | os.PathLike],
    image_shape: tuple[int, int, int],
    preprocessing: dict[str, Any],
    batch_size: int,
) -> tuple[list[str], Iterable[np.ndarray], int]:
    """(names of the images, batches of float32 NHWC, normalised, the size of the largest one).

    Args:
      places: one .npy file, or image files and folders.
      image_shape: (height, width, channels) that a model takes.
      preprocessing: fields of `Preprocessing`, by which image files are prepared.
      batch_size: of all batches but the last one.

    Raises:
      UserError: images that cannot be read or do not fit; of files, when their batch is read.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    fetched = [storage.fetched(place, "images") for place in places]
    first = fetched[0]
    if first.suffix.lower() == ".npy":
        if len(fetched) > 1:
            raise UserError("give one .npy file, or image files and folders")
        images = read_array(first, image_shape)
        _check_finite(images)
        whole = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        return [str(i) for i in range(len(images))], whole, min(batch_size, len(images))

    files = image_files.find(fetched)
    prepared = image_files.Preprocessing(**preprocessing)

    def batches() -> Iterator[np.ndarray]:
        height, width, channels = image_shape
        for i in range(0, len(files), batch_size):
            chunk = files[i : i + batch_size]
            pixels = [image_files.read(path, (height, width), channels, prepared) for path in chunk]
            yield prepared.normalise(np.stack(pixels))

    return [str(path) for path in files], batches(), min(batch_size, len(files))


# --- what was found -------------------------------------------------------------------------------


def check_classes(class_names: Sequence[str]) -> None:
    """Raise UserError for a model without a class head."""
    if not class_names:
        raise UserError("the model has no class head; --out FILE.npy writes its features")


def top_classes(
    logits: np.ndarray, class_names: Sequence[str], count: int = 5
) -> list[list[tuple[str, float]]]:
    """For each image its `count` most probable classes and their probabilities, best first."""
    check_classes(class_names)
    if count < 1:
        raise UserError(f"top {count} classes were asked for; expected at least 1")
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :count]
    return [
        [(class_names[i], float(row[i])) for i in chosen]
        for row, chosen in zip(probabilities, best, strict=True)
    ]


def describe_allocation(allocations: np.ndarray) -> list[str]:
    """A line per layer: the allocations that its batches (or images) had, (n, L, K)."""
    lines = []
    for layer, rows in enumerate(tree_utils.allocations_by_frequency(list(allocations))):
        more = f" (and {len(rows) - 1} others)" if len(rows) > 1 else ""
        shown = " ".join(map(str, rows[0]))
        lines.append(f"layer {layer}: query heads per key/value head {shown}{more}")
    return lines


def write(
    path: str | os.PathLike,
    names: Sequence[str],
    output: np.ndarray,
    class_names: Sequence[str],
    top: int = 5,
) -> None:
    """Write the output of a model, whole or not at all: .npy, .csv or .json (top classes).

    Raises UserError: another kind of file, or it cannot be written.
    """
    check_output(path)
    place = paths.place(path)
    with workdir.written_file(place) as temporary:
        if place.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, output)
        else:
            content = _WRITERS[place.suffix](names, output, class_names, top)
            temporary.write_bytes(content)


def check_output(path: str | os.PathLike | None, features: str | None = None) -> None:
    """Raise UserError for a kind of file that cannot hold what is asked for; None: no file."""
    suffix = paths.place(path).suffix if path else None
    if features and suffix != ".npy":
        raise UserError("features are arrays of numbers: --features needs --out FILE.npy")
    if path and suffix not in (".npy", *_WRITERS):
        known = ", ".join((".npy", *_WRITERS))
        raise UserError(f"{path}: unknown kind of file; expected one of {known}")


def _csv(names: Sequence[str], logits: np.ndarray, class_names: Any, top: int) -> bytes:
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(["image", "rank", "class", "probability"])
    for name, classes in zip(names, top_classes(logits, class_names, top), strict=True):
        rows.writerows([name, i, *found] for i, found in enumerate(classes, 1))
    return file.getvalue().encode(errors="backslashreplace")  # names that are not UTF-8


def _json(names: Sequence[str], logits: np.ndarray, class_names: Any, top: int) -> bytes:
    records = [
        {"image": name, "classes": [{"name": n, "probability": p} for n, p in classes]}
        for name, classes in zip(names, top_classes(logits, class_names, top), strict=True)
    ]
    return (json.dumps(records, indent=2) + "\n").encode()


_WRITERS = {".csv": _csv, ".json": _json}
