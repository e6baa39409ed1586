"""Every export of every variant and option, read back: equal bit for bit, or refused in a sentence.

    python tests/sweep_exports.py [--every-dtype] [--share 0.1] [--seed 0]

A tiny model of every variant with K = 1, N/2 and N key/value heads, at each value of each option of
`VALUES`, is written as a model directory, and from there as safetensors and as a file of the
released code. `convert.load` reads each of them, and is given nothing but the number of query heads
of a released file. Dtypes of computation and parameters are the plain ones; where no option is set,
all of `DTYPES` too; where K = N/2 or of `mha`, another pair by chance (`--every-dtype`: all of them
everywhere). Then

- a directory and a safetensors file give an equal model and equal arrays, dtypes included;
- the logits are those of the source, bit for bit. They are computed for safetensors in the plain
  dtypes, and wherever the model that was read is another one: a released file does not say how to
  compute, and is run as the source is. Elsewhere it would be the same function of the same arrays;
- what is refused is refused by a `UserError` of one line that names the option, and nothing is
  written.

Exit status 1 if anything is wrong.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import allocation, checkpoint, convert, tree_utils, vit
from kdgqa_jax.attention import VARIANTS
from kdgqa_jax.errors import UserError

N = 4
SIZE = {"name": "custom/2", "width": 16, "depth": 2, "num_heads": N, "mlp_width": 12,
        "image_size": 4, "num_classes": 3}  # fmt: skip

VALUES: dict[str, list[dict[str, Any]]] = {
    "as it is": [{}],
    "memory": [{}],  # allocations that do not follow from the norms
    "num_classes": [{"num_classes": 0}],
    "image_size": [{"image_size": (4, 8)}, {"image_size": (2, 8)}],
    "patch_size": [{"patch_size": 4}],
    "pool": [{"pool": pool} for pool in ("avg", "max", "avgmax", "map")],
    "pool_include_prefix": [{"pool": "avg", "pool_include_prefix": True}],
    "norm_pooled": [{"norm_pooled": True}, {"pool": "avg", "norm_pooled": False}],
    "final_norm": [{"final_norm": False}],
    "reg_tokens": [{"reg_tokens": 2}],
    "no_embed_class": [{"no_embed_class": True}, {"no_embed_class": True, "reg_tokens": 2}],
    "pre_norm": [{"pre_norm": True}],
    "patch_bias": [{"patch_bias": False}],
    "embed_norm": [{"embed_norm": True}],
    "layer_scale": [{"layer_scale": 0.1}],
    "qk_norm": [{"qk_norm": True}],
    "scale_attn_norm": [{"scale_attn_norm": True}],
    "scale_mlp_norm": [{"scale_mlp_norm": True}],
    "proj_bias": [{"proj_bias": False}],
    "mlp_bias": [{"mlp_bias": False}],
    "head_width": [{"head_width": 3}, {"head_width": 4}],
    "v_head_width": [{"v_head_width": 3}, {"head_width": 3, "v_head_width": 2}],
    "activation": [{"activation": name} for name in ("quick_gelu", "gelu_tanh", "silu", "relu")],
    "gated_mlp": [{"gated_mlp": True}, {"gated_mlp": True, "activation": "silu"}],
    "norm": [{"norm": "rmsnorm"}],
    "block": [{"block": "post_norm"}, {"block": "parallel"}],
    "class_token": [{"pool": "avg", "class_token": False}],
    "distillation": [{"distillation": kind} for kind in ("token", "head")],
    "representation_size": [{"representation_size": 5}],
    "norm_epsilon": [{"norm_epsilon": 1e-3}],
    "qkv_bias": [{"qkv_bias": False}],
    "importance": [{"importance": kind} for kind in ("variance", "max_norm", "gradient")],
    "allocation_scope": [{"allocation_scope": "example"}],
    "min_heads_per_group": [{"min_heads_per_group": 1}],
    "beta": [{"beta": 0.5}],
    "window": [{"window": 7}],
    "noise_target": [{"noise_target": "output"}, {"noise_target": "output", "noise_at_eval": True}],
    "noise_distribution": [
        {"noise_distribution": "uniform"},
        {"noise_distribution": "uniform", "noise_at_eval": True},
    ],
    "noise_statistics": [
        {"noise_statistics": "mean_std"},
        {"noise_statistics": "mean_std", "noise_at_eval": True},
    ],
    "noise_scale": [{"noise_scale": 0.5}, {"noise_scale": 0.5, "noise_at_eval": True}],
    "noise_at_eval": [{"noise_at_eval": True}],
    "scan_layers": [{"scan_layers": True}],
    "remat": [{"remat": "full"}],
    "implementation": [{"implementation": "chunked"}],
    "expansion": [{"expansion": "gather"}],
    "dropout": [{"dropout": 0.1}],
    "attn_dropout": [{"attn_dropout": 0.1}],
    "drop_path": [{"drop_path": 0.1}],
}
"""Values of every option of a model but its sizes, its variant and its dtypes."""

COVERED = {*VALUES, *SIZE, "num_kv_heads", "attention", "dtype", "param_dtype"}

HALF = ("float32", "bfloat16", *(["float16"] if helpers.compiles("float16") else []))
DTYPES = [(None, "float32"), *itertools.product(HALF, HALF)]

HOW_TO_RUN = (
    "scan_layers",
    "remat",
    "implementation",
    "expansion",
    "dropout",
    "attn_dropout",
    "drop_path",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: a value of an option, everything else as it is by default."""

    attention: str
    num_kv_heads: int
    option: str
    value: int
    dtype: str | None
    param_dtype: str

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            **SIZE,
            "attention": self.attention,
            "num_kv_heads": self.num_kv_heads,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            **VALUES[self.option][self.value],
        }


def all_cases(every_dtype: bool = True) -> list[Case]:
    """Every variant, K and value of an option; of the dtypes those that the module describes."""
    models = [
        (attention, heads, option, i)
        for attention in VARIANTS
        for heads in ((N,) if attention == "mha" else (1, N // 2, N))
        for option, values in VALUES.items()
        for i in range(len(values))
    ]
    chance = random.Random(0)

    def dtypes(attention: str, heads: int, option: str) -> Sequence[tuple[str | None, str]]:
        if every_dtype or option == "as it is":
            return DTYPES
        others = [chance.choice(DTYPES[1:])] if heads == N // 2 or attention == "mha" else []
        return [DTYPES[0], *others]

    return [Case(*model, *pair) for model in models for pair in dtypes(*model[:3])]


def random_variables(model: vit.VisionTransformer, other_memory: bool) -> dict[str, Any]:
    """Parameters large enough for groups to matter; memories as training could leave them."""
    rng = np.random.default_rng(0)
    heads = model.attention.num_kv_heads
    order = [list(a) for a in itertools.product(range(N + 1), repeat=heads) if sum(a) == N]

    def draw(path: Any, like: Any) -> np.ndarray:
        name = path[-1].key
        if name == "allocation":
            return np.zeros(like.shape, np.int32)
        value = rng.standard_normal(like.shape) * 0.4 + (name == "scale")
        return (np.abs(value) if path[0].key == "norm_stats" else value).astype(like.dtype)

    shapes = vit.variable_shapes(model, 1)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    for block in variables.get("norm_stats", {}).values():
        memory = block["attn"]
        if "allocation" in memory:
            follows = np.asarray(allocation.apportion(jnp.asarray(memory["key_norm"]), N))
            flat = memory["allocation"].reshape(-1, heads)
            for row, own in zip(flat, follows.reshape(-1, heads), strict=True):
                row[:] = order[rng.integers(len(order))] if other_memory else own
    return variables


def logits(model: vit.VisionTransformer, variables: dict[str, Any]) -> np.ndarray:
    """Operation by operation: programs share what is compiled."""
    images = helpers.normal(5, 2, *model.image_shape, 1)
    return np.asarray(vit.apply_in_evaluation(model, variables, images)[0])


def same(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def check(case: Case, folder: pathlib.Path, counts: collections.Counter) -> list[str]:
    """Sentences about what is wrong with the exports of one model."""
    try:
        model = vit.create(**case.arguments)
    except UserError:  # options that do not go together
        counts["no such model"] += 1
        return []
    variables = random_variables(model, case.option == "memory")
    description = {"model": case.arguments, "channels": 1, "class_names": [],
                   "preprocessing": {"mean": 0.5, "std": 0.5}}  # fmt: skip
    description["class_names"] = [str(i) for i in range(model.num_classes)]
    directory = folder / "model"
    checkpoint.save_model(directory, variables, description)
    expected = None
    wrong = []
    for to in ("directory", "safetensors", "released"):
        path = directory if to == "directory" else folder / f"of_{case.attention}.{to}"
        path = path.with_suffix(".pth") if to == "released" else path
        try:
            if to != "directory":
                path.unlink(missing_ok=True)
                convert.export(directory, path, to)
            found = convert.load(path, num_heads=N if to == "released" else None)
        except UserError as error:
            counts[f"{to}: refused"] += 1
            named = case.option.replace("as it is", "dtype").replace("memory", "allocation")
            if to != "released" or path.exists() or "\n" in str(error):
                wrong.append(f"{case} {to}: {error}")
            elif named not in str(error) and "dtype=" not in str(error):
                wrong.append(f"{case} {to}: refused without a word on {named}: {error}")
            continue
        equal = found.model == model and same(jax.device_get(found.variables), variables)
        if to != "released" and not equal:
            wrong.append(f"{case} {to}: another model or other arrays")
            continue
        if not equal or (to == "safetensors" and case.dtype is None):
            how = {name: vit.arguments(model)[name] for name in HOW_TO_RUN}
            arguments = {**found.description["model"], **how}
            run = vit.create(**arguments)
            layout = tree_utils.stack_layers if run.scan_layers else tree_utils.unstack_layers
            arrays = {name: layout(tree) for name, tree in found.variables.items()}
            expected = logits(model, variables) if expected is None else expected
            counts["logits compared"] += 1
            if logits(run, arrays).tobytes() != expected.tobytes():
                wrong.append(f"{case} {to}: other logits")
                continue
        counts[f"{to}: equal"] += 1
    return wrong


def sweep(cases: list[Case], folder: pathlib.Path) -> tuple[collections.Counter, list[str]]:
    """(counts, sentences about what is wrong)."""
    counts: collections.Counter = collections.Counter()
    wrong = []
    for done, case in enumerate(cases, 1):
        found = check(case, folder, counts)
        wrong += found
        for sentence in found:
            print(sentence, file=sys.stderr)
        if done % 100 == 0:
            print(f"{done} of {len(cases)} models, {len(wrong)} wrong", file=sys.stderr)
            jax.clear_caches()  # every program of every model, else
    counts["wrong"] = len(wrong)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every-dtype", action="store_true", help="for every option")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    arguments = parser.parse_args()
    cases = all_cases(arguments.every_dtype)
    count = max(round(arguments.share * len(cases)), 1)
    cases = random.Random(arguments.seed).sample(cases, count)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts, wrong = sweep(cases, pathlib.Path(folder))
    print(f"{count} models, {time.monotonic() - started:.0f} s")
    for name, n in sorted(counts.items()):
        print(f"{name}: {n}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
