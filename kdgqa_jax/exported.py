"""Exported functions: a model as one file that JAX and NumPy can call, on any batch size.

The file is a NumPy archive. Its members are the arrays of the model directory by their paths, the
program (`FUNCTION`: bytes of `jax.export`) and a description (`METADATA`: JSON). JAX promises to
read a program for some releases only, and needs flatbuffers for it; the arrays can be read for as
long as NumPy can.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kdgqa_jax import checkpoint, extras, paths, predict, storage, version, vit, workdir
from kdgqa_jax.errors import UserError, one_line, unknown

Array = jax.Array
Arrays = dict[str, np.ndarray]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""What programs can be lowered for, in the words of `jax.export`."""

DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")

FUNCTION, METADATA = "function", "metadata"
FORMAT = 1

ATTENTION = "xla"
"""The implementation of attention in exported programs: the one that serves on all platforms."""


# --- writing ------------------------------------------------------------------------------------


def independent_model(
    model: vit.VisionTransformer, name: str, allocation_scope: str | None = None
) -> vit.VisionTransformer:
    """The model, if its output for an image does not depend on the other images of the batch.

    Args:
      model: any variant.
      name: what an error calls it.
      allocation_scope: "example" groups image by image where the model has one grouping for the
        whole batch; its output changes by that. None: such a model is refused.

    Raises:
      UserError: it depends on them, or an unknown scope.
    """
    if allocation_scope not in (None, "example"):
        raise unknown("allocation scope of an exported model", allocation_scope, ["example"])
    attention = model.attention
    if attention.noise is not None and attention.noise.noise_at_eval:
        raise UserError(
            f"{name} has noise in evaluation, which depends on the place of an image in its batch;"
            " an exported model must not: set noise_at_eval to false in its model.json"
        )
    if (
        not attention.rule.by_batch
        or attention.fixed_allocation(attention.initial_memory()) is not None
    ):
        return model
    if allocation_scope is None:
        raise UserError(
            f"{name} groups its heads by all images of a batch (allocation_scope 'batch'), and an"
            " exported model must not depend on batch mates; --allocation-scope example exports it"
            " with a grouping of each image by itself"
        )
    try:
        arguments = {**vit.arguments(model), "allocation_scope": allocation_scope}
        return vit.create("custom", **arguments)
    except UserError as error:
        raise UserError(f"{name} cannot group image by image ({error})") from None


def function_of(model: vit.VisionTransformer) -> Callable[[dict[str, Array], Array], Array]:
    """(arrays by path, images (b, height, width, channels) float32, normalised) -> (b, classes).

    Logits in float32; of a model without a head pooled features (b, D). Arrays of bfloat16 are
    given by their bits as uint16, which NumPy can store.
    """
    attention = dataclasses.replace(model.attention, implementation=ATTENTION)
    model = model.clone(attention=attention)
    dtypes = flatten_dict(vit.variable_shapes(model), sep="/")  # channels do not matter to dtypes

    def call(arrays: dict[str, Array], images: Array) -> Array:
        typed = {
            name: x
            if x.dtype == dtypes[name].dtype
            else jax.lax.bitcast_convert_type(x, dtypes[name].dtype)
            for name, x in arrays.items()
        }
        variables = unflatten_dict(typed, sep="/")
        mask = jnp.ones(images.shape[0], bool)
        return vit.apply_in_evaluation(model, variables, images, mask)[0].astype(jnp.float32)

    return call


def stored(variables: dict[str, Any]) -> Arrays:
    """The arrays by path, as the file has them: bfloat16 by its bits, uint16."""
    flat = flatten_dict(jax.device_get(variables), sep="/")
    return {
        name: x.view(np.uint16) if x.dtype == jnp.bfloat16 else np.asarray(x)
        for name, x in flat.items()
    }


def metadata_of(model: vit.VisionTransformer, description: dict[str, Any]) -> dict[str, Any]:
    """What an exported file says of its model, JSON; `description` is that of its directory."""
    return {
        "model": vit.arguments(model),
        "image_shape": (*model.image_shape, description["channels"]),
        "class_names": description["class_names"],
        "preprocessing": description["preprocessing"],
        "versions": version.versions(),
    }


def export(
    directory: str | os.PathLike,
    out: str | os.PathLike,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    allocation_scope: str | None = None,
) -> dict[str, Any]:
    """Write the model of a model directory as a function; its metadata.

    Args:
      directory: a model directory.
      out: the .npz file.
      platforms: names in `PLATFORMS` that the program is lowered for. Where it runs, its numbers
        are those of `predict` with attention by `ATTENTION`; layers are scanned or not as suits the
        platform that exports.
      allocation_scope: as for `independent_model`.

    Raises:
      UserError: no model there, one that depends on batch mates, an unknown platform, or a file
        that cannot be written.
    """
    if pathlib.Path(out).suffix != ".npz":
        raise UserError(f"{out}: give a name in .npz (a function for JAX) or in .onnx")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown("platform", platform, PLATFORMS)
    if not platforms:
        raise UserError(f"no platform to export for; expected some of {', '.join(PLATFORMS)}")
    place = paths.place(out)
    extras.needs("flatbuffers", "exporting a function")
    model, variables, description = checkpoint.load_model(directory)
    model = independent_model(model, f"the model in {directory}", allocation_scope)
    arrays = stored(variables)
    program = _lowered(model, arrays, (*model.image_shape, description["channels"]), platforms)
    metadata = {
        "format": FORMAT,
        **metadata_of(model, description),
        "platforms": list(program.platforms),
        "attention": ATTENTION,
    }
    members = {
        **arrays,
        METADATA: np.frombuffer(json.dumps(metadata).encode(), np.uint8),
        FUNCTION: np.frombuffer(program.serialize(), np.uint8),
    }
    with workdir.written_file(place) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **members)
    return metadata


def _lowered(
    model: vit.VisionTransformer,
    arrays: Arrays,
    image_shape: tuple[int, ...],
    platforms: Sequence[str],
) -> jax.export.Exported:
    (batch,) = jax.export.symbolic_shape("b")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    function = jax.jit(function_of(model))
    return jax.export.export(function, platforms=tuple(platforms))(shapes, images)


# --- reading ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A function that was exported.

    Attributes:
      arrays: the weights by path, as they are stored.
      metadata: what `export` wrote of the model, its classes and images, platforms and versions.
      call: (arrays, images) -> logits; jitted, one compilation for each batch size.
    """

    arrays: Arrays
    metadata: dict[str, Any]
    call: Callable[[Arrays, np.ndarray], Array]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of images."""
        height, width, channels = self.metadata["image_shape"]
        return height, width, channels

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits (n, classes) float32 for (n, height, width, channels) float32 images, normalised.

        Raises UserError for images of another shape or dtype.
        """
        if images.shape[1:] != self.image_shape or images.dtype != np.float32 or not len(images):
            raise UserError(
                f"images {images.dtype} {images.shape}; the exported model takes float32"
                f" {('n', *self.image_shape)}"
            )
        return np.asarray(self.call(self.arrays, images))


def load(path: str | os.PathLike) -> ExportedModel:
    """The function in a file that `export` wrote.

    Raises UserError: no such file, a damaged one, one that this release of JAX cannot read, or one
    that was not lowered for the platform of this process.
    """
    place = storage.fetched(path, "exported function")
    try:
        with np.load(place, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        metadata = json.loads(bytes(arrays.pop(METADATA)))
        function = bytearray(arrays.pop(FUNCTION))
        known = metadata["format"] == FORMAT and len(metadata["image_shape"]) == 3
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not an exported function, or a damaged one ({one_line(error)}); `kdgqa"
            " export` writes them"
        ) from None
    if not known:
        raise UserError(f"{path} was written by another release of kdgqa-jax; export it again")
    extras.needs("flatbuffers", "reading an exported function")
    try:
        program = jax.export.deserialize(function)
    except Exception as error:  # whatever reading a program of other releases raises
        raise UserError(
            f"the program in {path} cannot be read by jax {jax.__version__} ({one_line(error)});"
            " its arrays can, by numpy.load; export the model again"
        ) from None
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if here not in program.platforms:
        raise UserError(
            f"{path} is for {', '.join(program.platforms)}, and this process runs on {here};"
            f" export it with --platforms {','.join((*program.platforms, here))}"
        )
    return ExportedModel(arrays, metadata, jax.jit(program.call))


def predict_files(
    path: str | os.PathLike,
    places: Sequence[str | os.PathLike],
    batch_size: int = 256,
    needs_classes: bool = False,
) -> tuple[list[str], np.ndarray, list[str]]:
    """(names of the images, logits (n, classes) float32, class names): `predict.predict_files`.

    The last batch is padded, as it is there: the same shapes give the same bits.

    Args:
      path: of an exported function.
      places: one .npy file of normalised float32 NHWC images, or image files and folders.
      batch_size: images per batch.
      needs_classes: refuse a model without a class head, before any image is read.

    Raises:
      UserError: what `load` raises, or images that cannot be read or do not fit.
    """
    model = load(path)
    classes = model.metadata["class_names"]
    if needs_classes:
        predict.check_classes(classes)
    names, batches, size = predict.read_batches(
        places, model.image_shape, model.metadata["preprocessing"], batch_size
    )
    outputs = []
    for images in batches:
        padded = np.pad(images, [(0, size - len(images))] + [(0, 0)] * 3)
        outputs.append(model(padded)[: len(images)])
    return names, np.concatenate(outputs), classes
