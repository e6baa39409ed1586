"""The attention module: every variant against plain numpy, its state, its options, its errors."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import DGQA, VARIANTS, B, D, H, K, N, T, layer, layer_variables, tokens

from kdgqa_jax.attention import VARIANTS as TABLE
from kdgqa_jax.attention import resolve_num_kv_heads, variant_name
from kdgqa_jax.errors import UserError

CAPTURED = ["grouping", "intermediates", "norm_stats"]
NORM_VARIANTS = ("kdgqa", *DGQA)


def applied(module, jit=helpers.fast_jit, **fixed):
    """(variables, x, step, mask) -> (output, captured collections), compiled once."""

    def run(variables, x, step=None, mask=None):
        return module.apply(
            variables, x, step=step, mask=mask, mutable=CAPTURED, rngs=helpers.rngs(), **fixed
        )

    return jit(run)


# --- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention, options",
    [
        *((name, {}) for name in VARIANTS),
        ("kdgqa", {"allocation_scope": "example"}),
        ("gqa", {"num_kv_heads": 2}),
        ("gqa", {"qkv_bias": False}),
        ("kdgqa", {"expansion": "one_hot"}),
        ("kdgqa", {"implementation": "chunked"}),
    ],
)
def test_evaluation_equals_numpy(attention, options):
    module, x = layer(attention, **options), tokens(features=12)
    variables = layer_variables(module)
    params = variables["params"]
    norms = helpers.key_norms(x, params)
    if "norm_stats" in variables:
        allocation = np.array([1, 5, 0], np.int32)
        variables["norm_stats"]["allocation"] = jnp.asarray(allocation)
    elif attention == "kdgqa" and options.get("allocation_scope") == "example":
        helpers.assert_away_from_ties(attention, norms, N)
        allocation = np.array([helpers.naive_kdgqa(row, N) for row in norms])
        assert len(np.unique(allocation, axis=0)) > 1
    elif attention == "kdgqa":
        helpers.assert_away_from_ties(attention, norms.mean(0), N)
        allocation = np.array(helpers.naive_kdgqa(norms.mean(0), N))
    else:
        allocation = np.array(helpers.naive_equal(N, norms.shape[1]))
    index = np.array([helpers.naive_index(a) for a in np.atleast_2d(allocation)])

    out, captured = applied(module, jax.jit)(variables, x)
    helpers.assert_close(out, helpers.naive_layer(x, params, index), 1e-5)
    grouping = captured["grouping"]
    np.testing.assert_array_equal(grouping["allocation"], allocation)
    np.testing.assert_array_equal(np.atleast_2d(grouping["group_index"]), index)
    expected = norms if allocation.ndim == 2 else norms.mean(0)
    helpers.assert_close(grouping["key_norm"], expected, 1e-5)
    q, k, v = (helpers.project(x, params, name) for name in ("query", "key", "value"))
    maps = helpers.naive_attention(q, k, v, index)[1]
    helpers.assert_close(captured["intermediates"]["maps"], maps, 1e-5)
    if attention == "kdgqa":  # capturing changes nothing
        plain = helpers.fast_jit(module.apply)(variables, x)
        helpers.assert_close(plain, out, 1e-5)


def test_as_many_key_heads_as_query_heads_is_mha():
    variables = layer_variables(layer("mha"))
    expected = applied(layer("mha"))(variables, tokens())[0]
    for name in ("mhsa", "gqa", "pgqa"):
        out = applied(layer(name, num_kv_heads=N))(variables, tokens())[0]
        np.testing.assert_array_equal(out, expected)


def test_example_scope_does_not_depend_on_batch_mates_and_batch_scope_does():
    variables, x = layer_variables(layer("kdgqa")), tokens(features=12)
    mates = np.concatenate([x[:1], tokens(5, B - 1, features=2)])
    run = applied(layer("kdgqa", allocation_scope="example"))
    expected, captured = run(variables, x)
    assert captured["grouping"]["group_index"].shape == (B, N)
    for batch in (mates, np.repeat(x[:1], B, axis=0)):
        np.testing.assert_array_equal(run(variables, batch)[0][0], expected[0])
    run = applied(layer("kdgqa"))
    assert np.abs(run(variables, mates)[0][0] - run(variables, x)[0][0]).max() > 0.1


@pytest.mark.parametrize(
    "attention, options",
    [*((name, {}) for name in VARIANTS), ("kdgqa", {"allocation_scope": "example"})],
)
def test_padding_changes_no_real_image(attention, options):
    """In training, where every variant has most to do."""
    module, x, step = layer(attention, **options), tokens(features=6), jnp.int32(0)
    variables, run = layer_variables(module), applied(module, train=True)
    out, state = run(variables, x, step)
    mask = np.arange(B + 2) < B
    for filling in (np.nan, 1e3):
        padded = np.concatenate([x, np.full((2, T, D), filling, np.float32)])
        padded_out, padded_state = run(variables, padded, step, mask)
        helpers.assert_close(padded_out[:B], out, 1e-6)
        assert ("norm_stats" in state) == (attention in DGQA)
        stats = (s.get("norm_stats", {}) for s in (padded_state, state))
        helpers.assert_close(*stats, 1e-6)
    if (attention, options) == ("kdgqa", {}):  # the published rule, which knows no mask
        assert np.abs(run(variables, padded, step)[0][:B] - out).max() > 0.1


# --- state of DGQA ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", DGQA)
def test_dgqa_updates_on_the_window_only(attention):
    window, options = 3, {"beta": 0.75} if attention == "dgqa_ema" else {}
    module = layer(attention, window=window, **options)
    variables = layer_variables(module)
    train, evaluate = applied(module, train=True), applied(module)
    cache, allocation = np.zeros(K, np.float32), helpers.naive_equal(N, K)
    seen = []
    for step in range(1, 14):  # starts in the middle of a window, as after a restart
        x = tokens(step, features=2)
        if step % window == 0:
            norms = np.float32(helpers.key_norms(x, variables["params"]).mean(0))
            if attention == "dgqa_ema":
                cache = np.float32(0.75) * norms + np.float32(0.25) * cache
                allocation = helpers.naive_apportion(cache, N)
            else:
                allocation, cache = helpers.naive_apportion(np.abs(norms - cache), N), norms
        _, new = train(variables, x, jnp.int32(step))
        variables["norm_stats"] = new["norm_stats"]
        assert new["norm_stats"]["allocation"].tolist() == allocation, step
        assert new["grouping"]["group_index"].tolist() == helpers.naive_index(allocation).tolist()
        helpers.assert_close(new["norm_stats"]["key_norm"], cache, 1e-5)
        assert new["norm_stats"]["key_norm"].dtype == jnp.float32
        _, kept = evaluate(variables, tokens(50 + step, features=2), jnp.int32(step))
        helpers.assert_close(kept["norm_stats"], new["norm_stats"], 0)
        seen.append(tuple(allocation))
    assert len(set(seen)) >= 3


@pytest.mark.parametrize("attention", DGQA)
def test_dgqa_in_training_needs_the_step(attention):
    module = layer(attention)
    variables = helpers.fast_jit(module.init)(jax.random.key(0), tokens())
    helpers.assert_close(variables["norm_stats"], layer_variables(module)["norm_stats"], 0)
    with pytest.raises(ValueError, match=r"DGQA\w+ in training needs step="):
        module.apply(variables, tokens(), train=True, mutable=["norm_stats"])


# --- importance and minimum ---------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l2", "variance", "max_norm"])
@pytest.mark.parametrize("attention", NORM_VARIANTS)
def test_importance_drives_the_allocation(importance, attention):
    module, x = layer(attention, importance=importance), tokens(3, features=3)
    variables = layer_variables(module)
    key = helpers.project(x, variables["params"], "key")
    scores = {
        "l2": np.sqrt((key**2).sum((1, 3))),
        "variance": key.var(1).sum(-1),
        "max_norm": np.sqrt((key**2).sum(-1)).max(1),
    }[importance].mean(0)
    rule = helpers.naive_kdgqa if attention == "kdgqa" else helpers.naive_apportion
    _, captured = applied(module, train=True)(variables, x, jnp.int32(0))
    helpers.assert_close(captured["grouping"]["key_norm"], scores, 1e-5)
    assert captured["grouping"]["allocation"].tolist() == rule(scores, N)


@pytest.mark.parametrize("attention", NORM_VARIANTS)
def test_importance_gradient_uses_what_was_remembered(attention):
    module = layer(attention, importance="gradient")
    variables, x = layer_variables(module), tokens()
    run = applied(module, train=True)
    first = run(variables, x, jnp.int32(0))[1]
    assert first["grouping"]["allocation"].tolist() == [2, 2, 2]
    remembered = np.float32([1.0, 4.0, 2.5])
    variables["norm_stats"]["key_gradient"] = jnp.asarray(remembered)
    rule = helpers.naive_kdgqa if attention == "kdgqa" else helpers.naive_apportion
    for use in [run] + [applied(module)] * (attention == "kdgqa"):
        _, captured = use(variables, x, jnp.int32(0))
        assert captured["grouping"]["allocation"].tolist() == rule(remembered, N)
        np.testing.assert_array_equal(captured["norm_stats"]["key_gradient"], remembered)


@pytest.mark.parametrize("bias", [True, False])
def test_importance_gradient_is_learnt_from_gradients_of_key_heads(bias):
    kernel, offset = helpers.normal(0, D, K, H), helpers.normal(1, K, H)
    key = {"kernel": kernel, "bias": offset} if bias else {"kernel": kernel}
    old = {"key_gradient": jnp.zeros(K), "key_norm": jnp.ones(K)}
    rule = layer("dgqa_ema", importance="gradient").config.rule
    new = rule.learn(old, {"key": key, "query": {"kernel": kernel}})
    squares = (kernel.astype(np.float64) ** 2).sum((0, 2))
    squares += (offset.astype(np.float64) ** 2).sum(-1) if bias else 0.0
    helpers.assert_close(new["key_gradient"], np.sqrt(squares), 1e-6)
    np.testing.assert_array_equal(new["key_norm"], old["key_norm"])
    assert layer("dgqa_ema").config.rule.learn(old, {}) is old


@pytest.mark.parametrize("attention", NORM_VARIANTS)
def test_min_heads_per_group_leaves_no_head_idle(attention):
    allocations = []
    for least in (0, 1):
        module = layer(attention, min_heads_per_group=least)
        variables = layer_variables(module)
        for name, parameter in variables["params"]["key"].items():
            variables["params"]["key"][name] = parameter * np.float32([1e-3, 1, 2])[:, None]
        captured = applied(module, train=True)(variables, tokens(), jnp.int32(0))[1]
        allocations.append(captured["grouping"]["allocation"].tolist())
    assert allocations[0][0] == 0
    assert (min(allocations[1]), sum(allocations[1])) == (1, N)


# --- noise --------------------------------------------------------------------------------------


def standardised(taken, clean, statistics):
    """The draw behind the noise `taken` from `clean`: both have their statistics by row."""
    mean = clean.mean(-1, keepdims=True) if statistics == "mean_std" else 0.0
    return (taken - mean) / clean.std(-1, keepdims=True)


@pytest.mark.parametrize("statistics", ["std", "mean_std"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_pgqa_perturbs_the_maps_off_the_diagonal(distribution, statistics):
    options = {"noise_distribution": distribution, "noise_statistics": statistics}
    module, x = layer("pgqa", noise_scale=0.5, **options), tokens()
    variables = layer_variables(module)
    clean_out, clean = applied(module)(variables, x)
    out, noisy = applied(module, train=True)(variables, x)
    clean, noisy = (np.asarray(c["intermediates"]["maps"]) for c in (clean, noisy))
    taken = (clean - noisy) / 0.5
    diagonal = np.eye(T, dtype=bool)
    np.testing.assert_array_equal(taken[..., diagonal], 0.0)
    z = standardised(taken, clean, statistics)[..., ~diagonal]
    helpers.assert_close(z, np.broadcast_to(z[:1], z.shape), 1e-5)
    assert z.std() > 0.5
    assert np.abs(out - clean_out).max() > 0.05


@pytest.mark.parametrize("statistics", ["std", "mean_std"])
def test_pgqa_perturbs_the_output_but_its_first_entries(statistics):
    options = {"noise_target": "output", "noise_distribution": "uniform"}
    module, x = layer("pgqa", noise_statistics=statistics, **options), tokens()
    variables = layer_variables(module)
    variables["params"]["out"] = {"kernel": jnp.eye(D).reshape(N, H, D), "bias": jnp.zeros(D)}
    clean, clean_captured = applied(module)(variables, x)
    noisy, captured = applied(module, train=True)(variables, x)
    for name in ("maps", "values"):
        before, after = (c["intermediates"][name] for c in (clean_captured, captured))
        helpers.assert_close(after, before, 1e-6)
    clean, noisy = (np.asarray(o).reshape(B, T, N, H) for o in (clean, noisy))
    helpers.assert_close(noisy[..., 0], clean[..., 0], 1e-6)
    z = standardised(clean - noisy, clean, statistics)[..., 1:]
    helpers.assert_close(z, np.broadcast_to(z[:1], z.shape), 1e-5)
    assert np.all(z.std((0, 1, 2)) > 0.5)


@pytest.mark.parametrize("target", ["maps", "output"])
def test_pgqa_without_noise_is_gqa_and_evaluation_is_deterministic(target):
    variables, x = layer_variables(layer("gqa")), tokens()
    module = functools.partial(layer, "pgqa", noise_target=target)
    noisy = module(noise_at_eval=True)

    @helpers.fast_jit
    def outputs(seed):
        return {
            "gqa": layer("gqa").apply(variables, x),
            "evaluation": module().apply(variables, x),  # needs no rng
            "silent": module(noise_scale=0.0).apply(variables, x, train=True, rngs=helpers.rngs()),
            "noisy": noisy.apply(variables, x, rngs={"noise": jax.random.key(seed)}),
        }

    first, again, other = (outputs(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["evaluation"], first["gqa"])
    helpers.assert_close(first["silent"], first["gqa"], 1e-5)
    np.testing.assert_array_equal(first["noisy"], again["noisy"])
    for quiet in (other["noisy"], first["gqa"]):
        assert np.abs(first["noisy"] - quiet).max() > 0.01


# --- compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", NORM_VARIANTS)
def test_one_compilation_serves_every_allocation(attention):
    module = layer(attention, window=2)
    state = layer_variables(module)
    params = state.pop("params")

    @helpers.fast_jit
    def update(params, state, x, step):
        def loss(params):
            out, captured = module.apply(
                {"params": params, **state}, x, train=True, step=step, mutable=CAPTURED
            )
            return jnp.mean(jnp.square(out)), captured

        grads, captured = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), captured

    seen = set()
    for step in range(50):
        params, captured = update(params, state, tokens(step, features=2), np.int32(step))
        state = {name: tree for name, tree in captured.items() if name == "norm_stats"}
        seen.add(tuple(captured["grouping"]["allocation"].tolist()))
    assert len(seen) >= 3
    assert update._cache_size() == 1


@pytest.mark.parametrize("attention", ["kdgqa", "dgqa_ema"])
def test_bfloat16_keeps_statistics_in_float32(attention):
    variables, x = layer_variables(layer(attention)), tokens(features=12)
    out, wanted = applied(layer(attention), train=True)(variables, x, jnp.int32(0))
    module = layer(attention, dtype=jnp.bfloat16)
    low, captured = applied(module, train=True)(variables, x, jnp.int32(0))
    assert (low.dtype, captured["grouping"]["key_norm"].dtype) == (jnp.bfloat16, jnp.float32)
    allocations = [c["grouping"]["allocation"].tolist() for c in (captured, wanted)]
    assert allocations[0] == allocations[1] != [2, 2, 2]
    helpers.assert_close(np.float32(low), out, 3e-2)


# --- use and misuse -----------------------------------------------------------------------------


class Classifier(nn.Module):
    """A module of somebody else's."""

    @nn.compact
    def __call__(self, x, train=False, step=None):
        for name in ("first", "second"):
            x = x + layer("dgqa_ema", window=1, name=name)(x, train=train, step=step)
        return nn.Dense(3)(x.mean(1))


def test_use_in_a_module_of_ones_own():
    model, x = Classifier(), tokens()
    variables = helpers.random_variables(helpers.init_shapes(model, x))
    params = variables.pop("params")

    @helpers.fast_jit
    def run(params):
        def forward(params):
            out, new = model.apply({"params": params, **variables}, x, True, 0, mutable=CAPTURED)
            return jnp.square(out).sum(), new

        return jax.grad(forward, has_aux=True)(params)

    grads, captured = run(params)
    for name in ("first", "second"):
        assert np.all(captured["norm_stats"][name]["key_norm"] > 0)
        assert sum(captured["grouping"][name]["allocation"]) == N
        assert np.all(grads[name]["query"]["kernel"] != 0)


def test_the_table_of_variants_is_tested():
    assert set(TABLE) == set(VARIANTS)
    assert variant_name("mhsa") == "mha"
    for name in helpers.GROUPED:
        assert resolve_num_kv_heads(name, 12) == 6
    assert [resolve_num_kv_heads(*args) for args in (("mha", 12), ("gqa", 1))] == [12, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attention": "kdgq"}, "attention variant 'kdgq': did you mean 'kdgqa'"),
        ({"num_kv_heads": 4}, r"num_kv_heads=4 does not divide .* one of \[1, 2, 3, 6\]"),
        ({"attention": "mha", "num_kv_heads": 3}, "'mha' has as many .* num_kv_heads=3"),
        ({"importance": "l3"}, "unknown importance 'l3': .*valid: l2, variance, max_norm, grad"),
        ({"allocation_scope": "image"}, "allocation_scope 'image': valid: batch, example"),
        ({"noise_target": "map"}, "noise_target 'map': did you mean 'maps'"),
        ({"noise_statistics": "mean"}, "unknown noise_statistics 'mean': did you mean 'mean_std'"),
        ({"noise_distribution": "gauss"}, "noise_distribution 'gauss': .*normal, uniform"),
        ({"expansion": "onehot"}, "expansion 'onehot': did you mean 'one_hot'"),
        ({"implementation": "gather"}, "implementation 'gather': .*valid: None, xla, chunked"),
        ({"min_heads_per_group": 3}, "min_heads_per_group=3 for 3 key/value heads"),
        ({"window": 0}, "window=0 must be a number of steps, at least 1"),
        ({"importance": "gradient", "allocation_scope": "example"}, "one score per layer"),
        ({"num_heads": 5, "num_kv_heads": 5}, "width 48 is not a multiple of the 5 query heads"),
    ],
)
def test_bad_options_are_reported_in_one_sentence(options, message):
    fields = {"num_heads": N, "num_kv_heads": K, "attention": "kdgqa"} | options
    with pytest.raises(UserError, match=message) as caught:
        jax.eval_shape(layer(**fields).init, jax.random.key(0), tokens())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", helpers.DGQA)
def test_missing_memory_is_reported_in_one_sentence(attention):
    module, x = layer(attention), tokens()
    variables = helpers.fast_jit(module.init)(jax.random.key(0), x)
    with pytest.raises(UserError, match="reads its memory from the collection 'norm_stats'"):
        module.apply({"params": variables["params"]}, x)
