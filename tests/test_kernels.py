"""Pure functions of attention: grouped attention against a per-head loop in float64 (output,
gradients, and what is kept for the backward pass), and the noise of PGQA.
"""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdgqa_jax import noise
from kdgqa_jax.errors import UserError
from kdgqa_jax.kernels import (
    EXPANSIONS,
    chunked,
    expand_heads,
    grouped_attention,
)

B, T, S, N, K, H = 2, 5, 7, 6, 3, 4  # T != S, so that query and key shapes cannot be confused

WAYS = {name: {"expansion": name} for name in EXPANSIONS} | {
    "chunked": {"implementation": "chunked"}
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three chunks of three keys; the last two keys are padding."""
    monkeypatch.setattr(chunked, "CHUNK", 3)


def qkv(dtype=np.float32, num_kv_heads=K, source=S):
    query = helpers.normal(0, B, T, N, H)
    key, value = (helpers.normal(i, B, source, num_kv_heads, H) for i in (1, 2))
    return [jnp.asarray(x, dtype) for x in (2.0 * query, key, value)]


def random_index(seed: int, per_example: bool) -> np.ndarray:
    shape = (B, N) if per_example else (N,)
    return np.random.default_rng(seed).integers(0, K, shape).astype(np.int32)


def some_mask(kind: str | None) -> np.ndarray | None:
    if kind == "causal":
        return np.tril(np.ones((T, S), bool))
    if kind == "padding":  # the second example has four tokens
        return (np.arange(S) < np.array([[S], [4]]))[:, None, None, :]
    if kind == "full":
        mask = np.random.default_rng(5).random((B, N, T, S)) < 0.6
        mask[..., 0] = True
        return mask
    return None


def value_and_vjp(**options):
    """(query, key, value, cotangent, *index) -> (output, its three gradients), compiled."""

    def both(query, key, value, cotangent, *index):
        out, vjp = jax.vjp(
            lambda *qkv: grouped_attention(*qkv, *index, **options), query, key, value
        )
        return out, vjp(cotangent)

    return helpers.fast_jit(both)


@every_way
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("kind", [None, "causal", "padding", "full"])
def test_output_and_gradients_equal_the_loop(way, per_example, kind):
    mask, inputs, cotangent = some_mask(kind), qkv(), helpers.normal(3, B, T, N, H)
    compute = value_and_vjp(mask=mask, **WAYS[way])
    for seed in range(4):
        index = random_index(seed, per_example)
        out, grads = compute(*inputs, cotangent, index)
        expected, _, expected_grads = helpers.naive_attention(*inputs, index, mask, cotangent)
        helpers.assert_close(out, expected, 1e-5)
        for actual, wanted in zip(grads, expected_grads, strict=True):
            helpers.assert_close(actual, wanted, 1e-5)


@every_way
@pytest.mark.parametrize("values", [H - 3, H + 2])
@pytest.mark.parametrize("equal", [False, True])
def test_values_may_be_of_another_width_than_keys(way, values, equal):
    if equal and "expansion" in WAYS[way]:
        pytest.skip("equal groups are not expanded")
    query, key, _ = qkv()
    inputs = query, key, jnp.asarray(helpers.normal(7, B, S, K, values))
    cotangent, mask = helpers.normal(3, B, T, N, values), some_mask("causal")
    index = np.arange(N) // (N // K) if equal else random_index(0, True)
    compute = value_and_vjp(mask=mask, **WAYS[way])
    out, grads = compute(*inputs, cotangent, *([] if equal else [index]))
    expected, maps, expected_grads = helpers.naive_attention(*inputs, index, mask, cotangent)
    assert out.shape == (B, T, N, values)
    helpers.assert_close(out, expected, 1e-5)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        helpers.assert_close(actual, wanted, 1e-5)
    seen = grouped_attention(*inputs, jnp.asarray(index), mask=mask, return_maps=True)
    helpers.assert_close(seen, (expected, maps), 1e-5)


@every_way
def test_idle_heads_get_exactly_zero_gradient_and_no_other_head_does(way):
    compute = value_and_vjp(**WAYS[way])
    cotangent = helpers.normal(3, B, T, N, H)
    index = np.array([[0, 0, 0, 2, 2, 2], [1, 1, 1, 1, 1, 1]], np.int32)
    _, grads = compute(*qkv(), cotangent, index)
    used = np.stack([np.isin(np.arange(K), row) for row in index])[:, None, :, None]
    for grad in grads[1:]:
        np.testing.assert_array_equal(np.asarray(grad) != 0, np.broadcast_to(used, grad.shape))
    assert np.all(np.asarray(grads[0]) != 0)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("per_example", [False, True])
def test_expansions_agree(dtype, per_example):
    index, cotangent = (
        random_index(0, per_example),
        jnp.asarray(helpers.normal(3, B, T, N, H), dtype),
    )
    results = [value_and_vjp(expansion=name)(*qkv(dtype), cotangent, index) for name in EXPANSIONS]
    for out, grads in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        for a, b in zip(grads, results[0][1], strict=True):
            relative = 1e-6 if dtype == np.float32 else 2e-2
            helpers.assert_close(np.float32(a), np.float32(b), relative)


@pytest.mark.parametrize("expansion", [*EXPANSIONS, None])
def test_expand_heads_is_indexing(expansion):
    _, key, _ = qkv()
    index = random_index(1, True)
    expanded = expand_heads(key, jnp.asarray(index), expansion)
    np.testing.assert_array_equal(
        expanded, np.stack([np.asarray(key)[b][:, index[b]] for b in range(B)])
    )
    np.testing.assert_array_equal(
        expand_heads(key, jnp.asarray(index[0]), expansion), np.asarray(key)[:, :, index[0]]
    )


def test_index_per_example_is_the_index_of_each_example():
    inputs, index = qkv(), random_index(2, True)
    together = grouped_attention(*inputs, jnp.asarray(index))
    for b in range(B):
        alone = grouped_attention(*(x[b : b + 1] for x in inputs), jnp.asarray(index[b]))
        helpers.assert_close(together[b : b + 1], alone, 1e-6)


# --- the equal grouping -------------------------------------------------------------------------


def repeated_attention(query, key, value, mask=None):
    """Multi-head attention on repeated heads."""
    key, value = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(H)
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value)


@pytest.mark.parametrize("kind", [None, "full"])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
def test_equal_grouping_is_repeated_multi_head_attention(num_kv_heads, kind):
    inputs, mask, cotangent = (
        qkv(num_kv_heads=num_kv_heads),
        some_mask(kind),
        helpers.normal(3, B, T, N, H),
    )
    index = np.repeat(np.arange(num_kv_heads), N // num_kv_heads)

    @helpers.fast_jit
    def all_ways(query, key, value):
        ways = {
            "static": lambda *x: grouped_attention(*x, mask=mask),
            "dynamic": lambda *x: grouped_attention(*x, jnp.asarray(index), mask=mask),
            "chunked": lambda *x: grouped_attention(*x, mask=mask, implementation="chunked"),
            "repeated": lambda *x: repeated_attention(*x, mask),
            "jax.nn": lambda *x: jax.nn.dot_product_attention(*x, mask=mask),
        }
        results = {}
        for name, way in ways.items():
            out, vjp = jax.vjp(way, query, key, value)
            results[name] = (out, *vjp(cotangent))
        return results

    results = all_ways(*inputs)
    for name in ("dynamic", "chunked", "repeated", "jax.nn"):
        for ours, other in zip(results["static"], results[name], strict=True):
            helpers.assert_close(ours, other, 1e-5)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [None, random_index(0, False), random_index(0, True)])
def test_maps(index):
    mask = some_mask("full")
    expected = np.repeat(np.arange(K), N // K) if index is None else index
    inputs = qkv()
    index = None if index is None else jnp.asarray(index)
    out, maps = grouped_attention(*inputs, index, mask=mask, return_maps=True)
    helpers.assert_close(maps, helpers.naive_attention(*inputs, expected, mask)[1], 1e-6)
    helpers.assert_close(maps.sum(-1), 1.0, 1e-6)
    np.testing.assert_array_equal(np.asarray(maps)[~mask], 0.0)
    helpers.assert_close(out, grouped_attention(*inputs, index, mask=mask), 1e-6)


def test_a_row_without_any_token_attends_to_all_equally():
    mask = np.ones((T, S), bool)
    mask[2] = False
    out, maps = grouped_attention(*qkv(), mask=mask, return_maps=True)
    helpers.assert_close(maps[:, :, 2], 1 / S, 1e-6)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("index", [None, random_index(0, True)])
def test_dropout_drops_map_entries_and_keeps_their_mean(index):
    inputs, rate, draws = qkv(), 0.3, 2000
    index = None if index is None else jnp.asarray(index)
    plain = grouped_attention(*inputs, index, return_maps=True)

    @helpers.fast_jit
    def dropped(rngs):
        def one(rng):
            return grouped_attention(
                *inputs, index, dropout_rate=rate, dropout_rng=rng, return_maps=True
            )

        return jax.vmap(one)(rngs)

    out, maps = dropped(jax.random.split(jax.random.key(0), draws))
    kept = np.asarray(maps) != 0
    assert abs(kept.mean() - (1 - rate)) < 1e-3
    assert np.all(np.abs(kept.mean(0) - (1 - rate)) < 0.06)  # every entry has its own coin
    scaled = np.broadcast_to(plain[1] / (1 - rate), kept.shape)
    helpers.assert_close(np.asarray(maps)[kept], scaled[kept], 1e-5)
    helpers.assert_close(out.mean(0), plain[0], 0.1)
    with pytest.raises(ValueError, match="dropout_rate > 0 needs a dropout_rng"):
        grouped_attention(*inputs, index, dropout_rate=rate)


def test_transform_sees_the_maps_before_dropout():
    inputs = qkv()
    seen = []

    def transform(maps):
        seen.append(maps)
        return jnp.zeros_like(maps).at[..., 0].set(1.0)

    out, maps = grouped_attention(*inputs, transform_maps=transform, return_maps=True)
    helpers.assert_close(seen[0], grouped_attention(*inputs, return_maps=True)[1], 1e-6)
    np.testing.assert_array_equal(maps[..., 0], 1.0)
    first = np.repeat(np.asarray(inputs[2])[:, :1], N // K, axis=2)
    helpers.assert_close(out, np.broadcast_to(first, out.shape), 1e-6)


def test_bfloat16_computes_scores_in_float32():
    inputs, index = qkv(jnp.bfloat16), random_index(0, True)
    out, maps = helpers.fast_jit(lambda *x: grouped_attention(*x, return_maps=True))(*inputs, index)
    assert out.dtype == maps.dtype == jnp.bfloat16
    expected, expected_maps, _ = helpers.naive_attention(*inputs, index)
    helpers.assert_close(np.float32(out), expected, 3e-2)
    helpers.assert_close(np.float32(maps), expected_maps, 1e-2)
    # A shift of all scores by 2000 is lost in bfloat16 (steps of 8) and changes no map in float32.
    query, key, value = (jnp.ones((1, 1, 1, 2), jnp.bfloat16) * x for x in (2000.0, 1.0, 1.0))
    key = jnp.concatenate([key, key * jnp.array([1.0, 1.0 + 2**-7], jnp.bfloat16)], axis=1)
    _, maps = grouped_attention(query, key, jnp.repeat(value, 2, axis=1), return_maps=True)
    gap = 2000.0 * 2**-7 / np.sqrt(2)
    helpers.assert_close(np.float32(maps)[0, 0, 0, 0], np.exp(-gap), 0.1)


# --- differentiation ----------------------------------------------------------------------------


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_forward_mode_agrees_with_reverse_mode_of_the_loop(expansion):
    inputs, index = qkv(), random_index(0, True)
    tangents = [jnp.asarray(helpers.normal(10 + i, *x.shape)) for i, x in enumerate(inputs)]
    cotangent = helpers.normal(3, B, T, N, H)

    @helpers.fast_jit
    def forward(inputs, tangents):
        def attend(*x):
            options = {"expansion": expansion, "return_maps": True}
            return grouped_attention(*x, jnp.asarray(index), **options)[0]

        return jax.jvp(attend, inputs, tangents)[1]

    along = np.sum(np.float64(forward(inputs, tangents)) * cotangent)
    grads = helpers.naive_attention(*inputs, index, cotangent=cotangent)[2]
    expected = sum(np.sum(g * np.float64(t)) for g, t in zip(grads, tangents, strict=True))
    helpers.assert_close(along, expected, 1e-5)


def kept_shapes(attend, num_kv_heads=K) -> list[tuple[int, ...]]:
    """Shapes of what the forward pass keeps for the backward pass."""
    vjp = jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], *qkv(num_kv_heads=num_kv_heads))
    return [leaf.shape for leaf in jax.tree.leaves(vjp)]


def has_expanded_heads(shapes) -> bool:
    """Some array has the source axis, the head width and N heads' worth of entries."""
    return any(
        S in shape and H in shape and np.prod(shape) >= B * S * N * H and T not in shape
        for shape in shapes
    )


@every_way
@pytest.mark.parametrize("per_example", [False, True, None])
@pytest.mark.parametrize("jitted", [False, True])
def test_only_k_heads_are_kept_for_the_backward_pass(way, per_example, jitted):
    index = None if per_example is None else jnp.asarray(random_index(0, per_example))

    def attend(*x):
        return grouped_attention(*x, index, **WAYS[way])

    shapes = kept_shapes(jax.jit(attend) if jitted else attend)
    assert not has_expanded_heads(shapes), shapes
    assert shapes.count((B, S, K, H)) == 2  # key and value
    # The check sees the expansion where it is kept.
    naive = kept_shapes(repeated_attention)
    assert has_expanded_heads(naive), naive


@every_way
@pytest.mark.parametrize("attention", ["kdgqa", *helpers.DGQA])
def test_a_layer_keeps_no_more_for_the_backward_pass_than_gqa(attention, way):
    def kept_bytes(module):
        variables = helpers.layer_variables(module)
        params, x = variables.pop("params"), jnp.ones((16, 65, helpers.D))

        def forward(params, x):
            variables_now = {"params": params, **variables}
            return module.apply(variables_now, x, train=True, step=0, mutable=["norm_stats"])[0]

        leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(forward, *a)[1], params, x))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    grouped = kept_bytes(helpers.layer(attention, **WAYS[way]))
    assert grouped <= 1.01 * kept_bytes(helpers.layer("gqa"))


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", noise.STATISTICS)
@pytest.mark.parametrize("distribution, kurtosis", [("normal", 3.0), ("uniform", 1.8)])
def test_noise_takes_the_statistics_of_each_row(distribution, kurtosis, statistics):
    target = helpers.normal(0, 3, 2, 4, 4096) * np.arange(1, 5)[:, None] + 7

    def draw(target):
        return noise.matched_noise(jax.random.key(0), target, distribution, statistics)

    rows = np.float64(helpers.fast_jit(draw)(target))
    mean = {"std": np.zeros((3, 2, 4)), "mean_std": target.mean(-1)}[statistics]
    helpers.assert_close(rows.mean(-1), mean, 1e-5, scale=target.max())
    helpers.assert_close(rows.std(-1), target.std(-1), 1e-4)
    z = (rows - mean[..., None]) / rows.std(-1, keepdims=True)
    helpers.assert_close(z, np.broadcast_to(z[:1], z.shape), 1e-5)  # one draw
    assert np.abs((z[0] ** 4).mean(-1) - kurtosis).max() < 0.4
    assert np.abs(np.corrcoef(z[0].reshape(8, -1)) - np.eye(8)).max() < 0.1  # one per row
    gradient = helpers.fast_jit(jax.grad(lambda target: draw(target).sum()))(target[..., :8])
    assert not gradient.any()


# --- what is refused ----------------------------------------------------------------------------

ones = jnp.ones


@pytest.mark.parametrize(
    "shapes, index, message",
    [
        (((2, 5, 4), (2, 7, 2, 3), (2, 7, 2, 3)), None, "query BTNH, key BSKH and value BSKV"),
        (((2, 5, 4, 3), (2, 7, 2), (2, 7, 2)), None, r"key \(2, 7, 2\)"),
        (((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 4, 3)), None, r"BSKV, got .*\(2, 7, 4, 3\)"),
        (((2, 5, 4, 3), (1, 7, 2, 3), (1, 7, 2, 3)), None, "agree in batch B and head width H"),
        (
            ((2, 5, 4, 3), (2, 7, 2, 8), (2, 7, 2, 8)),
            None,
            r"query \(2, 5, 4, 3\), key \(2, 7, 2, 8",
        ),
        (((2, 5, 4, 3), (2, 7, 3, 3), (2, 7, 3, 3)), None, "equal groups need K to divide N"),
        (((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)), (5,), r"\(N,\) = \(4,\).*got \(5,\)"),
        (((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)), (1, 4), r"\(B, N\) = \(2, 4\), got \(1, 4\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, index, message):
    index = None if index is None else jnp.zeros(index, jnp.int32)
    with pytest.raises(ValueError, match=message):
        grouped_attention(*(ones(shape) for shape in shapes), index)


@pytest.mark.parametrize(
    "refuse, message",
    [
        (lambda *x: expand_heads(x[1], x[3], "onehot"), "expansion 'onehot': did you mean"),
        (lambda *x: grouped_attention(*x, expansion="onehot"), "expansion 'onehot': did you mean"),
        (
            lambda *x: grouped_attention(*x, implementation="gather"),
            "implementation 'gather': .*valid: xla, chunked",
        ),
        (
            lambda *x: grouped_attention(*x, implementation="chunked", expansion="gather"),
            "'chunked' cannot serve here: expansion='gather' is an option of 'xla' alone; take",
        ),
        (
            lambda *x: grouped_attention(*x, implementation="chunked", transform_maps=jnp.sin),
            "'chunked' cannot serve here: it makes no attention maps, which dropout and noise",
        ),
    ],
)
@pytest.mark.parametrize("run", [lambda f, *x: f(*x), jax.eval_shape], ids=["eager", "traced"])
def test_what_cannot_serve_is_reported_in_one_sentence(refuse, message, run):
    with pytest.raises(UserError, match=message) as caught:
        run(refuse, *qkv(), jnp.zeros(N, jnp.int32))
    assert "\n" not in str(caught.value)
