"""Allocation rules: golden rows, properties, and the statistics that drive them."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdgqa_jax import allocation as alloc
from kdgqa_jax import rules

ROWS = 32  # all programs take this many rows, so that one compilation serves every test
RULES = ("kdgqa", "dgqa_ema", "dgqa_diff")
MAX = float(np.finfo(np.float32).max)


@functools.cache
def compiled(num_heads: int, min_heads: int = 0):
    """All rules in one program."""

    def rules(norms, cache):
        ema, ema_cache = alloc.dgqa_ema_allocation(norms, cache, num_heads, 0.9, min_heads)
        diff, diff_cache = alloc.dgqa_diff_allocation(norms, cache, num_heads, min_heads)
        return {
            "kdgqa": alloc.kdgqa_allocation(norms, num_heads, min_heads),
            "dgqa_ema": ema,
            "dgqa_diff": diff,
            "caches": (ema_cache, diff_cache),
        }

    return helpers.fast_jit(rules)


def evaluate(norms, num_heads, cache=None, min_heads=0):
    """The results of all rules for (rows, K) norms, as numpy arrays."""
    norms = np.asarray(norms, np.float32)
    cache = np.zeros_like(norms) if cache is None else np.asarray(cache, np.float32)
    padding = ((0, ROWS - len(norms)), (0, 0))
    result = compiled(num_heads, min_heads)(np.pad(norms, padding), np.pad(cache, padding))
    return jax.tree.map(lambda x: np.asarray(x)[: len(norms)], result)


# --- golden rows --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_golden_rows_are_reproduced_exactly(golden, name):
    data = golden(f"allocation_{name}")
    rule = getattr(alloc, f"{name}_allocation")
    shapes = np.stack([data["num_heads"], data["num_kv_heads"]], axis=1)
    seen = 0
    for num_heads, num_kv_heads in np.unique(shapes, axis=0).tolist():
        rows = np.flatnonzero((shapes == (num_heads, num_kv_heads)).all(axis=1))
        scores = [data[k][rows, :num_kv_heads] for k in ("norms", "cache") if k in data]
        jit = helpers.users_jit if num_kv_heads in (3, 7) else helpers.fast_jit
        result = jit(functools.partial(rule, num_heads=num_heads))(*scores)
        allocation = result if name == "kdgqa" else result[0]
        np.testing.assert_array_equal(allocation, data["allocation"][rows, :num_kv_heads])
        assert allocation.dtype == np.int32
        seen += len(rows)
    assert seen == len(shapes) >= 200


# --- properties ---------------------------------------------------------------------------------

# Compiled programs are kept per shape, so most draws come from a pool that spans the range: every
# K with N == K, N == 64 or something between.
POOL = [(k, (k, 64, 2 * k + 1)[k % 3]) for k in range(1, 17)]
shapes = st.sampled_from(POOL)
all_shapes = st.integers(1, 16).flatmap(lambda k: st.tuples(st.just(k), st.integers(k, 64)))
good = st.floats(2.0**-10, 2.0**10, width=32)
any_float = st.floats(width=32) | st.sampled_from([0.0, -1.0, MAX, np.inf, -np.inf, np.nan])


@st.composite
def rows_of(draw, elements=good, shapes=shapes, count=4):
    """(N, K) and `count` rows of K norms."""
    num_kv_heads, num_heads = draw(shapes)
    norms = draw(hnp.arrays(np.float32, (count, num_kv_heads), elements=elements, fill=elements))
    return num_heads, num_kv_heads, norms


def assert_valid(result, num_heads, least=0):
    for rule in RULES:
        np.testing.assert_array_equal(result[rule].sum(-1), num_heads)
        assert result[rule].min() >= least


@given(rows_of(elements=any_float, shapes=all_shapes, count=8))
@settings(max_examples=6)
def test_any_shape_gives_a_valid_allocation(case):
    num_heads, _, norms = case
    assert_valid(evaluate(norms, num_heads), num_heads)


@given(rows_of(), st.integers(0, 2**32 - 1))
def test_rules_equal_the_loops(case, seed):
    num_heads, num_kv_heads, norms = case
    drawn = np.random.default_rng(seed).gamma(4.0, 1.0, (12, num_kv_heads))
    norms = np.concatenate([norms, drawn]).astype(np.float32)
    kdgqa_rows, apportion_rows = helpers.away_from_ties(norms, num_heads)
    result = evaluate(norms, num_heads)
    assert_valid(result, num_heads)
    for row in np.flatnonzero(kdgqa_rows):
        assert result["kdgqa"][row].tolist() == helpers.naive_kdgqa(norms[row], num_heads)
    for row in np.flatnonzero(apportion_rows):
        expected = helpers.naive_apportion(norms[row], num_heads)
        for rule in RULES[1:]:  # an empty cache changes no ratio
            assert result[rule][row].tolist() == expected, rule


@given(shapes, good, st.sampled_from([0.0, 1.0, 3.0, 1e-3]))
def test_equal_scores_give_the_equal_allocation(shape, score, cache):
    num_kv_heads, num_heads = shape
    result = evaluate(
        np.full((1, num_kv_heads), score), num_heads, np.full((1, num_kv_heads), cache)
    )
    for rule in RULES:
        assert result[rule][0].tolist() == helpers.naive_equal(num_heads, num_kv_heads), rule


@given(rows_of(), st.integers(-10, 10), st.floats(0.01, 100.0))
def test_scaling_the_norms_changes_nothing(case, power, factor):
    num_heads, _, norms = case
    before = evaluate(norms, num_heads)
    exactly = evaluate(norms * np.float32(2.0) ** power, num_heads)
    nearly = evaluate(norms * np.float32(factor), num_heads)
    kdgqa_rows, apportion_rows = helpers.away_from_ties(norms, num_heads)
    for rule in RULES:
        np.testing.assert_array_equal(exactly[rule], before[rule])
        rows = kdgqa_rows if rule == "kdgqa" else apportion_rows
        np.testing.assert_array_equal(nearly[rule][rows], before[rule][rows])


@given(rows_of(), st.randoms(use_true_random=False))
def test_permuting_the_norms_permutes_the_allocation(case, random):
    num_heads, num_kv_heads, norms = case
    order = random.sample(range(num_kv_heads), num_kv_heads)
    before, after = evaluate(norms, num_heads), evaluate(norms[:, order], num_heads)
    kdgqa_rows, apportion_rows = helpers.away_from_ties(norms, num_heads)
    for rule in RULES[1:]:
        np.testing.assert_array_equal(
            after[rule][apportion_rows], before[rule][apportion_rows][:, order]
        )
    # KDGQA's repair takes the first of equal heads: a tie moves at most one query head.
    after, before = (r["kdgqa"][kdgqa_rows] for r in (after, before))
    np.testing.assert_array_equal(np.sort(after), np.sort(before))
    assert np.all(np.abs(after - before[:, order]) <= 1)
    low = norms[kdgqa_rows] - norms[kdgqa_rows].min(-1, keepdims=True)
    quotas = helpers.exact_quotas(low.astype(np.float64), num_heads)[0]
    adds_up = np.round(quotas).sum(-1) == num_heads
    np.testing.assert_array_equal(after[adds_up], before[adds_up][:, order])


@given(rows_of(elements=st.integers(1, 8).map(float)), st.randoms(use_true_random=False))
def test_ties_move_query_heads_between_equal_heads_only(case, random):
    num_heads, num_kv_heads, norms = case  # whole numbers: their sum is exact in any order
    order = random.sample(range(num_kv_heads), num_kv_heads)
    before, after = evaluate(norms, num_heads), evaluate(norms[:, order], num_heads)
    back = np.argsort(order)
    for i, row in enumerate(norms):
        values, where = np.unique(row, return_inverse=True)
        fractions = np.sort(row.sum() and values / row.sum() * num_heads % 1)
        if np.any(np.diff([*fractions, fractions[0] + 1]) < 1e-3):
            continue  # heads of different norms tie
        for rule in RULES[1:]:
            for value in range(len(values)):
                same = where == value
                assert sorted(before[rule][i, same]) == sorted(after[rule][i, back][same])


@given(
    rows_of(elements=any_float),
    hnp.arrays(np.float32, 16, elements=good),
)
def test_nan_and_infinity_leave_nothing_invalid(case, cache):
    num_heads, num_kv_heads, norms = case
    cache = np.broadcast_to(cache[:num_kv_heads], norms.shape)
    result = evaluate(norms, num_heads, cache)
    assert_valid(result, num_heads)
    broken = ~np.isfinite(norms).all(-1)
    for rule in RULES:
        for row in result[rule][broken]:
            assert row.tolist() == helpers.naive_equal(num_heads, num_kv_heads)
    for new in result["caches"]:
        assert np.isfinite(new).all()
        np.testing.assert_array_equal(new[broken], cache[broken])
    np.testing.assert_array_equal(result["caches"][1][~broken], norms[~broken])


@given(rows_of(elements=any_float, shapes=st.sampled_from([(3, 3), (7, 64), (8, 17), (16, 64)])))
def test_min_heads_per_group_is_kept(case):
    num_heads, num_kv_heads, norms = case
    least = {3: 1, 7: 9, 8: 1, 16: 2}[num_kv_heads]
    result = evaluate(norms, num_heads, min_heads=least)
    assert_valid(result, num_heads, least)
    free = evaluate(norms, num_heads)
    for rule in RULES:  # nothing changes where the minimum was met anyway
        met = free[rule].min(-1) >= least
        np.testing.assert_array_equal(result[rule][met], free[rule][met])


@pytest.mark.parametrize("least", [3, -1])
def test_a_minimum_that_cannot_be_kept_is_refused(least):
    for rule in (alloc.kdgqa_allocation, alloc.apportion):
        with pytest.raises(ValueError, match=f"min_heads_per_group={least} for 4 key/value heads"):
            rule(jnp.ones(4), 8, min_heads_per_group=least)


@functools.cache
def compiled_repair(num_heads):
    return helpers.fast_jit(functools.partial(alloc.repair, num_heads=num_heads))


@given(st.sampled_from(POOL), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_repair_equals_the_loop(shape, seed):
    num_kv_heads, num_heads = shape
    rng = np.random.default_rng(seed)
    off = rng.integers(0, num_heads + 1, (ROWS // 2, num_kv_heads))
    near = rng.multinomial(num_heads, np.full(num_kv_heads, 1 / num_kv_heads), ROWS // 2)
    near = np.clip(near + rng.integers(-1, 2, near.shape), 0, num_heads)
    rows = np.concatenate([off, near]).astype(np.int32)
    repaired = np.asarray(compiled_repair(num_heads)(rows))
    for before, after in zip(rows, repaired, strict=True):
        assert after.tolist() == helpers.naive_repair(before, num_heads)


# --- rules as functions -------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads, expected", [(5, [1, 2, 2]), (7, [0, 3, 4])])
def test_kdgqa_rounds_half_to_even(num_heads, expected):
    """Shares 0, 2.5, 2.5 round to 0, 2, 2 and the smallest gets one; 3.5 to 4, the first loses."""
    assert evaluate([[3.0, 5.0, 5.0]], num_heads)["kdgqa"].tolist() == [expected]


def test_cache_rules():
    norms, cache = np.float32([[1.0, 2.0, 5.0]]), np.float32([[3.0, 2.0, 1.0]])
    result = evaluate(norms, 8, cache)
    helpers.assert_close(result["caches"][0], 0.9 * norms + 0.1 * cache, 1e-6)
    np.testing.assert_array_equal(result["caches"][1], norms)
    assert result["dgqa_diff"].tolist() == [[3, 0, 5]]  # changes 2, 0, 4: shares 2.67, 0, 5.33
    old = helpers.fast_jit(lambda n, c: alloc.dgqa_ema_allocation(n, c, 8, beta=0.0))(norms, cache)
    assert old[0].tolist() == [[4, 3, 1]]  # shares 4, 2.67, 1.33
    np.testing.assert_array_equal(old[1], cache)


@pytest.mark.parametrize("rule", [alloc.kdgqa_allocation, alloc.apportion])
def test_vmap_equals_batch_equals_rows(rule):
    norms = np.abs(helpers.normal(0, 3, 4, 5)) + 1

    @helpers.fast_jit
    def compare(norms):
        def groups(norms):
            return alloc.assignment_mask(rule(norms, 12), 12)

        return groups(norms), jax.vmap(jax.vmap(groups))(norms), groups(norms[1, 2])

    batch, mapped, row = compare(norms)
    np.testing.assert_array_equal(mapped, batch)
    np.testing.assert_array_equal(row, batch[1, 2])


@given(st.sampled_from(POOL), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_group_index_and_mask_equal_repeat(shape, seed):
    num_kv_heads, num_heads = shape
    rng = np.random.default_rng(seed)
    allocation = rng.multinomial(num_heads, rng.dirichlet(np.full(num_kv_heads, 0.5)), 6)
    index = np.asarray(alloc.group_index(jnp.asarray(allocation), num_heads))
    mask = np.asarray(alloc.assignment_mask(jnp.asarray(allocation), num_heads))
    assert (index.dtype, mask.dtype) == (np.int32, np.bool_)
    assert mask.shape == (6, num_heads, num_kv_heads)
    for a, g, m in zip(allocation, index, mask, strict=True):
        np.testing.assert_array_equal(g, helpers.naive_index(a))
        np.testing.assert_array_equal(m, np.eye(num_kv_heads, dtype=bool)[helpers.naive_index(a)])


@pytest.mark.parametrize("num_heads, num_kv_heads", [(12, 4), (7, 3), (5, 5), (64, 1)])
def test_equal_allocation(num_heads, num_kv_heads):
    equal = alloc.equal_allocation(num_heads, num_kv_heads)
    assert equal.tolist() == helpers.naive_equal(num_heads, num_kv_heads)


@pytest.mark.parametrize("importance", ["l2", "variance", "max_norm"])
def test_norms_and_allocation_in_one_program_equal_two(importance):
    """A compiler may round a norm differently for each of its uses; no allocation may show it."""
    norms_of = functools.partial(alloc.key_head_norms, importance=importance)

    def allocations_of(norms):
        remembering = (alloc.dgqa_ema_allocation, alloc.dgqa_diff_allocation)
        others = [rule(norms, jnp.zeros_like(norms), 12)[0] for rule in remembering]
        return [alloc.kdgqa_allocation(norms, 12), *others]

    one = jax.jit(lambda key: (norms := norms_of(key), allocations_of(norms)))
    two = jax.jit(allocations_of)
    for seed in range(20):
        sizes = np.exp(0.3 * helpers.normal(seed, 6, 1))
        norms, allocations = one(sizes * helpers.normal(seed + 100, 3, 17, 6, 8))
        np.testing.assert_array_equal(allocations, two(norms))
        if helpers.away_from_ties(np.asarray(norms)[None], 12)[0][0]:
            assert allocations[0].tolist() == helpers.naive_kdgqa(norms, 12)


def lowered(function, *args) -> str:
    return jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("importance", ["l2", "variance", "max_norm"])
def test_no_loop_is_lowered(rule, importance):
    def chain(key, cache, mask):
        norms = alloc.key_head_norms(key, mask, importance=importance)
        function = getattr(alloc, f"{rule}_allocation")
        result = function(norms, 12, 1) if rule == "kdgqa" else function(norms, cache, 12)[0]
        return alloc.group_index(result, 12), alloc.assignment_mask(result, 12)

    text = lowered(chain, jnp.ones((2, 5, 4, 3)), jnp.ones(4), jnp.ones(2, bool))
    assert "stablehlo" in text and "while" not in text
    # The check sees a loop where there is one.
    assert "while" in lowered(lambda a: jnp.searchsorted(a, jnp.arange(12)), jnp.arange(4))


# --- key head norms -----------------------------------------------------------------------------

NUMPY_IMPORTANCE = {
    "l2": lambda key: np.sqrt((key**2).sum(axis=(1, 3))),
    "variance": lambda key: ((key - key.mean(1, keepdims=True)) ** 2).mean(1).sum(-1),
    "max_norm": lambda key: np.linalg.norm(key, axis=-1).max(1),
}


def test_every_importance_is_tested():
    assert set(alloc.IMPORTANCE) == set(NUMPY_IMPORTANCE)
    assert set(rules.IMPORTANCE) == {*NUMPY_IMPORTANCE, "gradient"}


@pytest.mark.parametrize("importance", NUMPY_IMPORTANCE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_key_head_norms(importance, dtype):
    key = jnp.asarray(helpers.normal(1, 5, 7, 3, 4) * np.float32([1, 2, 3])[:, None] + 0.5, dtype)
    mask = np.array([True, False, True, True, False])
    expected = NUMPY_IMPORTANCE[importance](np.asarray(key, np.float64))
    norms = functools.partial(alloc.key_head_norms, importance=importance)
    for actual, wanted in [
        (norms(key, per_example=True), expected),
        (norms(key, mask, per_example=True), expected),
        (norms(key), expected.mean(0)),
        (norms(key, mask), expected[mask].mean(0)),
        (norms(key, mask.astype(np.int32)), expected[mask].mean(0)),
    ]:
        assert actual.dtype == jnp.float32
        helpers.assert_close(actual, wanted, 1e-5)
    poisoned = jnp.where(mask[:, None, None, None], key, jnp.nan)
    np.testing.assert_array_equal(norms(poisoned, mask), norms(key, mask))
    np.testing.assert_array_equal(norms(key, np.zeros(5, bool)), np.zeros(3))
    gradient = jax.grad(lambda key: norms(key, mask).sum())(key)
    np.testing.assert_array_equal(gradient, np.zeros(key.shape))


def test_key_head_norms_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match=r"axes BSKH, got shape \(2, 3, 4\)"):
        alloc.key_head_norms(jnp.ones((2, 3, 4)))
    for name in ("gradient", "l3"):
        with pytest.raises(ValueError, match=f"{name!r}.*'l2', 'variance', 'max_norm'"):
            alloc.key_head_norms(jnp.ones((1, 2, 3, 4)), importance=name)


@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"mask.*\(4,\)"):
        alloc.key_head_norms(jnp.ones((4, 2, 3, 5)), jnp.ones(shape, bool))
