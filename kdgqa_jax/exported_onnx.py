"""Models as ONNX files, by jax2onnx: for runtimes without JAX."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdgqa_jax import checkpoint, exported, paths, tree_utils, version, vit, workdir
from kdgqa_jax.errors import UserError, one_line

SUFFIX = ".onnx"
TOLERANCE = 1e-4
"""Of logits by ONNX Runtime, of their largest magnitude."""

INSTALL = "pip install onnx onnx-ir onnxruntime dm-pix equinox; pip install --no-deps jax2onnx"
"""Its own dependencies hold an older release of Orbax."""


def export(
    directory: str | os.PathLike, out: str | os.PathLike, allocation_scope: str | None = None
) -> dict[str, Any]:
    """Write the model of a model directory as an ONNX file; its metadata.

    Its input `images` (b, height, width, channels) float32, normalised, has any number of rows;
    its output `logits` is (b, classes) float32. Classes, preprocessing and versions are in its
    metadata, each as JSON. ONNX Runtime has computed what the model does before anything is
    written.

    Args:
      directory: a model directory.
      out: the .onnx file; weights are in it.
      allocation_scope: as for `exported.independent_model`.

    Raises:
      UserError: no model there, one that depends on batch mates, packages that are missing, a
        model that jax2onnx or ONNX Runtime does not take, other numbers, or a file that cannot be
        written.
    """
    place = paths.place(out)
    try:
        with _quiet():
            import onnx
            import onnxruntime
            from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(f"{out}: ONNX needs more packages ({error}): {INSTALL}") from None
    model, variables, description = checkpoint.load_model(directory)
    model = exported.independent_model(model, f"the model in {directory}", allocation_scope)
    model = model.clone(scan_layers=False)  # the converter takes no scan over arrays
    variables = tree_utils.in_layout(variables, stacked=False)
    arrays = {name: jnp.asarray(x) for name, x in exported.stored(variables).items()}
    image_shape = (*model.image_shape, description["channels"])
    function = exported.function_of(model)
    try:
        with _quiet():
            program = to_onnx(
                lambda images: function(arrays, images),
                [("b", *image_shape)],
                model_name="kdgqa_jax",
                input_names=["images"],
                output_names=["logits"],
            )
            session = onnxruntime.InferenceSession(program.SerializeToString())
            noise = np.random.default_rng(0).standard_normal((3, *image_shape), np.float32)
            far = 0.0
            for images in (noise[:1], noise):
                (found,) = session.run(["logits"], {"images": images})
                far = max(far, _distance(found, function(arrays, jnp.asarray(images))))
    except Exception as error:  # whatever either of them raises
        raise UserError(
            f"the model in {directory} does not become ONNX ({one_line(error)}); `kdgqa export"
            " --out FILE.npz` writes it for JAX"
        ) from None
    if not far <= TOLERANCE:
        raise UserError(
            f"the model in {directory} does not become ONNX: logits by ONNX Runtime are {far:.1e}"
            f" of their size away, and {TOLERANCE:.0e} was expected"
        )
    metadata = {
        "model": vit.arguments(model),
        "image_shape": image_shape,
        "class_names": description["class_names"],
        "preprocessing": description["preprocessing"],
        "versions": version.versions(),
    }
    for name, value in metadata.items():
        program.metadata_props.add(key=name, value=json.dumps(value))
    onnx.checker.check_model(program)
    with workdir.written_file(place) as temporary:
        temporary.write_bytes(program.SerializeToString())
    return metadata


def _distance(found: np.ndarray, expected: Any) -> float:
    expected = np.asarray(expected)
    return float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-6))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter logs of optional packages and of shapes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
