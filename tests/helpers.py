"""What several test files share: tiny models, and independent references in plain numpy.

The references follow the text of docs/method.md with loops over images and heads, in float64
where they are compared within a tolerance. They share no code with the package.
"""

import dataclasses
import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdgqa_jax import vit
from kdgqa_jax.attention import GroupedQueryAttention, configure

VARIANTS = ("mha", "gqa", "kdgqa", "dgqa_ema", "dgqa_diff", "pgqa")
GROUPED = VARIANTS[1:]
DGQA = ("dgqa_ema", "dgqa_diff")
RNGS = ("dropout", "noise")

# Compiling is most of the time these tests take, and tiny programs gain nothing from LLVM's passes.
FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 11):
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False  # an option that later versions lack
AS_USERS_COMPILE = {
    name: {"xla_backend_optimization_level": 3}.get(name, not value)
    for name, value in FAST_COMPILE.items()
}


def fast_jit(function, **options):
    """`jax.jit` that compiles in half the time or less.

    Not for a test of rounding: what users run is optimised.
    """
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "mutable"))
def apply(model, variables, x, method=None, mutable=False):
    """`model.apply`, compiled: operation by operation it takes several times as long."""
    return model.apply(variables, x, method=method, mutable=mutable)


def users_jit(function, **options):
    """`jax.jit` with the optimisations of a user's process, which conftest.py turns off."""
    return jax.jit(function, compiler_options=AS_USERS_COMPILE, **options)


def child_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a process that a test starts: CPU devices, this package, our settings.

    XLA's flags of the tests stay, so that a run under other flags is one in its processes too.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    root = str(pathlib.Path(__file__).parents[1])
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip(),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
    }


@functools.cache
def compiles(dtype: str) -> bool:
    """If XLA can compile arithmetic in a dtype for this processor."""
    try:
        jax.jit(lambda x: 2 * x)(jnp.ones(2, dtype)).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def rngs(seed: int = 0, **options) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed + i, **options) for i, name in enumerate(RNGS)}


def normal(seed: int, *shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_close(actual: Any, expected: Any, relative: float, scale: float | None = None) -> None:
    """Assert that two arrays, or two trees of arrays, are equal but for rounding.

    Floats may differ by `relative` times the largest magnitude of their array. Rounding errors grow
    with the numbers that are summed, so a fixed bound means nothing without their size: what holds
    on one CPU fails on another, which sums in another order. A bound relative to each number fails
    where large numbers cancel. Integers and flags must be equal.

    Args:
      actual: an array or a tree of arrays.
      expected: of the same structure and shapes; an array may be compared with one number.
      relative: to the largest magnitude. One rounding of float32 is 6e-8.
      scale: takes the place of the largest magnitude, for arrays that are near zero because larger
        numbers cancel, such as the gradient of a key bias: see `largest`.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b, name = np.asarray(a), np.asarray(b), jax.tree_util.keystr(path)
        assert a.shape == b.shape or b.ndim == 0, f"{name}: {a.shape}, expected {b.shape}"
        if all(x.dtype.kind in "bui" for x in (a, b)):
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        atol = relative * (largest((a, b)) if scale is None else scale)
        np.testing.assert_allclose(a, b, rtol=0.0, atol=atol, err_msg=name)


def relative_difference(actual: Any, expected: Any) -> float:
    """The largest difference between two trees over their largest magnitude; 0 if they are empty.

    For what a test compares in another process and hands over as a number.
    """
    differences = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), actual, expected)
    return largest(differences) / (largest((actual, expected)) or 1.0)


def largest(tree: Any) -> float:
    """The largest magnitude of the finite numbers in a tree of arrays; 0 if there is none."""
    arrays = [np.abs(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return max((float(x[np.isfinite(x)].max(initial=0.0)) for x in arrays), default=0.0)


# --- tiny layers and models ---------------------------------------------------------------------

TINY = {
    "width": 48,
    "depth": 2,
    "num_heads": 6,
    "mlp_width": 64,
    "image_size": 8,
    "num_classes": 5,
}


def tiny_vit(attention: str = "gqa", **options) -> vit.VisionTransformer:
    """Five tokens, six query heads of width 8, two layers."""
    if attention != "mha":
        options.setdefault("num_kv_heads", 3)
    return vit.create("mu/4", attention=attention, **{**TINY, **options})


def images(batch: int = 4, side: int | tuple[int, int] = 8, channels: int = 1, seed: int = 0):
    height, width = (side, side) if isinstance(side, int) else side
    return normal(seed, batch, height, width, channels)


def random_variables(shapes: dict[str, Any], seed: int = 0, scale: float = 0.3) -> dict[str, Any]:
    """Random parameters for the shapes of an init; state (`norm_stats`) as an init makes it.

    The scale makes attention far from uniform; norm scales stay near one.
    """
    rng = np.random.default_rng(seed)

    def parameter(path, shape):
        value = scale * rng.standard_normal(shape.shape)
        if path[-1].key == "scale":
            value += 1.0
        return jnp.asarray(value, shape.dtype)

    def state(path, shape):
        value = 2 if path[-1].key == "allocation" else 0  # N/K of the tiny models
        return jnp.full(shape.shape, value, shape.dtype)

    return {
        name: jax.tree_util.tree_map_with_path(parameter if name == "params" else state, tree)
        for name, tree in shapes.items()
    }


def init_shapes(module, *args) -> dict[str, Any]:
    """Shapes of the variables, without running anything; sown collections left out."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return {name: shapes[name] for name in ("params", "norm_stats") if name in shapes}


def vit_variables(
    model: vit.VisionTransformer, seed: int = 0, channels: int = 1, scale: float = 0.3
) -> dict[str, Any]:
    """Random variables of an unrolled model, in which the key heads differ in size."""
    shape = (1, *model.image_shape, channels)
    variables = random_variables(init_shapes(model, jnp.zeros(shape)), seed, scale)
    for i in range(model.depth):
        key = variables["params"][f"blocks_{i}"]["attn"]["key"]
        key["kernel"] *= np.exp(normal(seed + i, key["kernel"].shape[1], 1))
    return variables


B, T, N, K, H = 3, 7, 6, 3, 8  # of the layers and their inputs; a mean over B is not exact
D = N * H


def layer(attention: str = "gqa", **values) -> GroupedQueryAttention:
    """A layer of a variant; `values` are those of its config or fields of the module."""
    if attention != "mha":
        values.setdefault("num_kv_heads", K)
    values.setdefault("num_heads", N)
    module = {f.name for f in dataclasses.fields(GroupedQueryAttention)}
    fields = {name: values.pop(name) for name in values.keys() & module}
    return GroupedQueryAttention(configure(attention, **values), **fields)


@functools.cache
def _layer_shapes(module) -> dict[str, Any]:
    return init_shapes(module, jnp.ones((1, T, D)))


def layer_variables(module: GroupedQueryAttention, seed: int = 0) -> dict[str, Any]:
    """Random variables in which the key heads differ in what they are large for."""
    variables = random_variables(_layer_shapes(module), seed, scale=0.15)
    kernel = variables["params"]["key"]["kernel"]
    kernel *= np.exp(normal(seed + 1, D, kernel.shape[1], 1))
    variables["params"]["key"]["kernel"] = kernel
    return variables


def tokens(seed: int = 0, batch: int = B, features: int = D) -> np.ndarray:
    """BTD; few active features make for key head norms far apart."""
    x = normal(seed, batch, T, D)
    x[..., np.random.default_rng(seed).permutation(D)[features:]] = 0.0
    return x


def randomise(variables, seed: int = 9):
    """Every array of floats replaced by random ones, large enough for attention to matter."""
    leaves, structure = jax.tree.flatten(variables)
    drawn = [
        0.3 * normal(seed + i, *x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.array(x)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


# --- the rules, as loops ------------------------------------------------------------------------


def naive_equal(num_heads: int, num_kv_heads: int) -> list[int]:
    share, rest = num_heads // num_kv_heads, num_heads % num_kv_heads
    return [share + 1] * rest + [share] * (num_kv_heads - rest)


def naive_repair(allocation, num_heads: int) -> list[int]:
    """One unit at a time, from the largest or to the smallest, the first one on a tie."""
    a = [int(x) for x in allocation]
    while sum(a) > num_heads:
        a[a.index(max(a))] -= 1
    while sum(a) < num_heads:
        a[a.index(min(a))] += 1
    return a


def naive_kdgqa(norms, num_heads: int) -> list[int]:
    n = np.asarray(norms, np.float32)
    s = (n - n.min()) / (n.max() - n.min())
    return naive_repair(np.round(s / s.sum() * num_heads), num_heads)


def naive_apportion(weights, num_heads: int) -> list[int]:
    """Floors, then one seat each in the order of the fractional parts, the first on a tie."""
    w = np.asarray(weights, np.float32)
    quotas = w / w.sum() * num_heads
    a = [int(q) for q in np.floor(quotas)]
    by_fraction = sorted(range(len(w)), key=lambda i: (-(quotas[i] - a[i]), i))
    for i in by_fraction[: num_heads - sum(a)]:
        a[i] += 1
    return a


def naive_index(allocation) -> np.ndarray:
    return np.repeat(np.arange(len(allocation)), allocation)


# --- ties ---------------------------------------------------------------------------------------


def exact_quotas(scores, num_heads):
    """Shares of N in float64, and how far each row (R, K) is from a tie: of rounding, of seats.

    A tie of seats is one of the fractional parts between which the last seat is decided. A share
    near a whole number is none: whether its fractional part is 0 or almost 1, it gets that number.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        quotas = scores / scores.sum(-1, keepdims=True) * num_heads
    to_half = np.abs(quotas - np.floor(quotas) - 0.5).min(-1)
    fractions = -np.sort(-(quotas - np.floor(quotas)), axis=-1)
    seats = np.round(np.nan_to_num(fractions.sum(-1, keepdims=True))).astype(int)
    last, left_out = (
        np.take_along_axis(np.pad(fractions, [(0, 0), (1, 0)], constant_values=1.0), i, axis=-1)
        for i in (seats, np.minimum(seats + 1, scores.shape[-1]))
    )
    return quotas, to_half, (last - left_out)[:, 0]


def away_from_ties(norms, num_heads, margin=1e-3):
    """For KDGQA and for apportionment: which rows no rounding error can change."""
    norms = np.asarray(norms, np.float64)
    spread = norms.max(-1) - norms.min(-1)
    kdgqa = exact_quotas(norms - norms.min(-1, keepdims=True), num_heads)[1] > margin
    kdgqa &= spread > 1e-2 * norms.max(-1)
    return kdgqa, exact_quotas(norms, num_heads)[2] > margin


def assert_away_from_ties(attention: str, norms: Any, num_heads: int) -> None:
    """Rounding errors cannot change the allocations that norms or scores (..., K) lead to.

    To be called where allocations of two programs, or of two machines, are compared.
    """
    rows = np.reshape(norms, (-1, np.shape(norms)[-1]))
    kdgqa, apportioned = away_from_ties(rows, num_heads)
    stable = kdgqa if attention == "kdgqa" else apportioned
    assert stable.all(), f"near a tie: {rows[~stable]}"


# --- attention and the model, as loops ----------------------------------------------------------


def naive_attention(query, key, value, index, mask=None, cotangent=None):
    """Per-head attention in float64 for BTNH, BSKH, BSKV and an index (N,) or (B, N).

    Returns (out BTNV, maps BNTS, gradients of sum(out * cotangent) or None).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, num_heads, width = q.shape
    index = np.broadcast_to(index, (batch, num_heads))
    maps = np.zeros((batch, num_heads, length, k.shape[1]))
    out = np.zeros((*q.shape[:3], v.shape[3]))
    if mask is not None:
        mask = np.broadcast_to(mask, maps.shape)
    grads = [np.zeros(x.shape) for x in (q, k, v)]
    for b in range(batch):
        for n in range(num_heads):
            j = index[b, n]
            scores = q[b, :, n] @ k[b, :, j].T / math.sqrt(width)
            if mask is not None:
                scores = np.where(mask[b, n], scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            maps[b, n], out[b, :, n] = p, p @ v[b, :, j]
            if cotangent is not None:
                c = np.asarray(cotangent[b, :, n], np.float64)
                dp = c @ v[b, :, j].T
                ds = p * (dp - np.sum(dp * p, -1, keepdims=True)) / math.sqrt(width)
                grads[0][b, :, n] = ds @ k[b, :, j]
                grads[1][b, :, j] += ds.T @ q[b, :, n]
                grads[2][b, :, j] += p.T @ c
    return out, maps, None if cotangent is None else grads


def project(x, params, name: str) -> np.ndarray:
    """The query, key or value projection of a layer in float64: BTD -> BT(heads)H."""
    p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
    return np.einsum("BTD,DNH->BTNH", np.asarray(x, np.float64), p["kernel"]) + p.get("bias", 0.0)


def key_norms(x, params) -> np.ndarray:
    """Frobenius norm of each image's keys by head: BTD -> (B, K)."""
    return np.sqrt(np.sum(project(x, params, "key") ** 2, axis=(1, 3)))


def naive_layer(x, params, index) -> np.ndarray:
    """The attention layer for a given group index: BTD -> BTD."""
    q, k, v = (project(x, params, name) for name in ("query", "key", "value"))
    out = naive_attention(q, k, v, index)[0]
    kernel, bias = (np.asarray(params["out"][name], np.float64) for name in ("kernel", "bias"))
    return np.einsum("BTNH,NHD->BTD", out, kernel) + bias


def naive_norm(x, params) -> np.ndarray:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * np.asarray(params["scale"]) + np.asarray(
        params["bias"]
    )


def naive_vit(
    images, params, index, patch: int, pool: str = "token", inputs: list | None = None
) -> np.ndarray:
    """timm's ViT in float64 with a given group index, or a list of one for each layer: logits.

    Attention inputs go to `inputs`.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    batch, height, width, _ = images.shape
    kernel = params["patch_embed"]["kernel"]
    tokens = [
        np.einsum("BHWC,HWCD->BD", images[:, i : i + patch, j : j + patch], kernel)
        for i in range(0, height, patch)
        for j in range(0, width, patch)
    ]
    x = np.stack(tokens, axis=1) + params["patch_embed"]["bias"]
    if "cls_token" in params:
        x = np.concatenate([np.repeat(params["cls_token"], batch, axis=0), x], axis=1)
    x = x + params["pos_embed"]
    depth = sum(name.startswith("blocks_") for name in params)
    indices = index if isinstance(index, list) else [index] * depth
    for i, index in enumerate(indices):
        block = params[f"blocks_{i}"]
        y = naive_norm(x, block["norm1"])
        if inputs is not None:
            inputs.append(y)
        x = x + naive_layer(y, block["attn"], index)
        y = naive_norm(x, block["norm2"])
        y = y @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
        y = 0.5 * y * (1.0 + np.vectorize(math.erf)(y / math.sqrt(2.0)))
        x = x + y @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"]
    if pool == "token":
        x = naive_norm(x, params["norm"])[:, 0]
    else:
        x = naive_norm(x[:, int("cls_token" in params) :].mean(1), params["fc_norm"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def load_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of `tests/goldens/NAME.npz`."""
    with np.load(pathlib.Path(__file__).parent / "goldens" / f"{name}.npz") as data:
        return dict(data)


def golden_weights(golden) -> dict[str, np.ndarray]:
    """The state dict of a golden run, by PyTorch names."""
    prefix = "weights/"
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def abstract(tree):
    """Shapes, dtypes and shardings of a tree of arrays on a device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
