"""Model directories with random parameters, for the tests of conversions."""

import helpers
import jax
import numpy as np

from kdgqa_jax import checkpoint, vit


def model_directory(path, attention, *, memory=None, **options):
    """`path`, a model directory of the sizes `helpers.TINY`.

    `memory` is what all layers hold in `norm_stats`, by name; the rest is as an init makes it.
    """
    options = {"name": "mu/4", "attention": attention, **helpers.TINY, **options}
    model = vit.create(**options)
    variables = jax.device_get(helpers.vit_variables(model.clone(scan_layers=False)))
    variables["params"] = jax.tree.map(
        lambda x: np.asarray(x).astype(model.param_dtype), variables["params"]
    )
    for block in variables.get("norm_stats", {}).values():
        for name, value in (memory or {}).items():
            block["attn"][name] = np.asarray(value, block["attn"][name].dtype)
    description = {
        "model": options,
        "channels": 1,
        "class_names": [f"class {i}" for i in range(model.num_classes)],
        "preprocessing": {"mean": 0.4, "std": 0.2},
    }
    checkpoint.save_model(path, variables, description)
    return path


def dtypes(tree):
    """The names of the dtypes in a tree."""
    return {x.dtype.name for x in jax.tree.leaves(tree)}
