"""Models as ONNX files, by jax2onnx: for runtimes without JAX."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import checkpoint, exported, paths, tree_utils, workdir
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
    its output `logits` is (b, classes) float32. Models of half precision become float32. Classes,
    preprocessing and versions are in its metadata, each as JSON. ONNX Runtime has computed what
    the model does before anything is written.

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
    except Exception as error:  # they are installed without their dependencies
        raise UserError(f"{out}: ONNX needs more packages ({one_line(error)}): {INSTALL}") from None
    model, variables, description = checkpoint.load_model(directory)
    model = exported.independent_model(model, f"the model in {directory}", allocation_scope)
    # Layers of their own: the converter takes no scan over arrays, and no bfloat16.
    model = model.clone(scan_layers=False, dtype=None, param_dtype="float32")
    variables = tree_utils.widened(tree_utils.in_layout(variables, stacked=False))
    arrays = {name: jnp.asarray(x) for name, x in exported.stored(variables).items()}
    metadata = exported.metadata_of(model, description)
    image_shape = metadata["image_shape"]
    function = exported.function_of(model)
    noise = np.random.default_rng(0).standard_normal((3, *image_shape), np.float32)
    try:
        with _quiet(), jax.default_matmul_precision("highest"):
            program = to_onnx(
                lambda images: function(arrays, images),
                [("b", *image_shape)],
                model_name="kdgqa_jax",
                input_names=["images"],
                output_names=["logits"],
            )
            for name, value in metadata.items():
                program.metadata_props.add(key=name, value=json.dumps(value))
            onnx.checker.check_model(program)
            content = program.SerializeToString()
            session = onnxruntime.InferenceSession(content)
            for images in (noise[:1], noise):
                (found,) = session.run(["logits"], {"images": images})
                _check(found, np.asarray(function(arrays, jnp.asarray(images))))
    except Exception as error:  # whatever any of them raises
        raise UserError(
            f"the model in {directory} does not become ONNX ({one_line(error)}); `kdgqa export"
            " --out FILE.npz` writes it for JAX"
        ) from None
    with workdir.written_file(place) as temporary:
        temporary.write_bytes(content)
    return metadata


def _check(found: np.ndarray, expected: np.ndarray) -> None:
    """Raise ValueError unless they are close; NaN is not."""
    if found.shape != expected.shape:
        raise ValueError(f"logits {found.shape} by ONNX Runtime, {expected.shape} expected")
    far = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-6)
    if not far <= TOLERANCE:
        raise ValueError(
            f"logits by ONNX Runtime are {far:.1e} of their size away, and {TOLERANCE:.0e} was"
            " expected"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converter logs of optional packages and of shapes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
