"""Merging of key/value heads of one layer: what it keeps, what it says it loses, bad input."""

import helpers
import jax
import numpy as np
import pytest
from helpers import D, H, N
from merging_helpers import (
    RULES,
    assert_same_function,
    by_group,
    naive_key_error,
    naive_logits,
    naive_mean_pooled,
    naive_value_errors,
    of_low_rank,
    random_layer,
    structured_tokens,
)

from kdgqa_jax import convert
from kdgqa_jax.errors import UserError

# --- exact where it can be ----------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "wanted"), [(6, 3), (6, 1), (3, 1)])
def test_groups_of_joint_rank_h_lose_nothing(kv_heads, wanted):
    attention = of_low_rank(random_layer(0, kv_heads), wanted)
    x = structured_tokens(images=8)
    merged = convert.merge_heads(attention, wanted, convert.InputMoments.of(x))
    assert merged.attention["key"]["kernel"].shape == (D, wanted, H)
    assert merged.attention["value"]["bias"].shape == (wanted, H)
    assert_same_function(structured_tokens(7, images=3), attention, merged.attention)
    helpers.assert_close(merged.keys_kept, 1.0, 1e-7)
    helpers.assert_close(merged.values_kept, 1.0, 1e-7)


def test_procrustes_undoes_rotations():
    """Heads that are turned versions of one another lose nothing by turning them back."""
    attention = random_layer()
    rng = np.random.default_rng(3)
    for name in ("key", "value"):
        for n in range(N):
            turn = np.linalg.qr(rng.standard_normal((H, H)))[0]
            first = attention[name]["kernel"][:, n - n % 2]
            attention[name]["kernel"][:, n] = first @ turn if n % 2 else first
    x = structured_tokens(images=8)
    merged = convert.merge_heads(attention, 3, convert.InputMoments.of(x), "procrustes")
    assert_same_function(x[:3], attention, merged.attention)


def test_procrustes_ends_where_every_head_fits_the_mean_best():
    """Then the products of each turned head with the mean are symmetric and positive."""
    heads = helpers.normal(4, 200, 5, H).astype(np.float64) @ np.diag(1.5 ** np.arange(H))
    moment = np.einsum("Tga,Thb->gahb", heads, heads) / len(heads)
    encoders, turns = convert.MERGING["procrustes"](moment, np.zeros((5, H, H)))
    turned = np.einsum("Tga,gab->Tgb", heads, turns)
    mean = turned.mean(axis=1)
    helpers.assert_close(np.einsum("Tga,gab->Tb", heads, encoders), mean, 1e-12)
    for g in range(5):
        helpers.assert_close(turns[g].T @ turns[g], np.eye(H), 1e-12)
        product = turned[:, g].T @ mean
        helpers.assert_close(product, product.T, 1e-3)
        assert np.linalg.eigvalsh(product + product.T).min() > 0


@pytest.mark.parametrize("rule", RULES)
def test_as_many_heads_change_nothing(rule):
    attention = random_layer(kv_heads=3)
    merged = convert.merge_heads(
        attention, 3, convert.InputMoments.of(structured_tokens(images=2)), rule
    )
    jax.tree.map(np.testing.assert_array_equal, merged.attention, attention)
    np.testing.assert_array_equal(merged.keys_kept, 1.0)


def test_projections_without_bias_stay_without():
    attention = of_low_rank(random_layer(), 3)
    for name in ("query", "key", "value"):
        del attention[name]["bias"]
    x = structured_tokens(images=8)
    merged = convert.merge_heads(attention, 3, convert.InputMoments.of(x)).attention
    assert jax.tree.structure(merged) == jax.tree.structure(attention)
    helpers.assert_close(naive_logits(x, merged), naive_logits(x, attention), 1e-9)
    missing = naive_value_errors(x, attention, merged).sum(axis=0)
    gained = merged["out"]["bias"] - attention["out"]["bias"]
    scale = helpers.largest(attention["out"]["kernel"])
    helpers.assert_close(missing, np.broadcast_to(gained, missing.shape), 1e-9, scale=scale)


# --- what is lost is what was said --------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "wanted"), [(6, 3), (6, 2), (6, 1), (3, 1)])
def test_errors_are_the_discarded_energy(kv_heads, wanted):
    """Queries and keys independent, and every head looking at a token of its own."""
    x = structured_tokens()
    attention, moments = random_layer(5, kv_heads), convert.InputMoments.of(x)
    key_losses, value_losses = {}, {}
    for rule in RULES:
        merged = convert.merge_heads(attention, wanted, moments, rule)
        keys = by_group(naive_key_error(x, attention, merged.attention), wanted)
        helpers.assert_close(merged.key_lost, keys, 1e-9)
        errors = naive_value_errors(x, attention, merged.attention)
        means = errors.mean(axis=1, keepdims=True)
        values = by_group(np.mean(np.sum((errors - means) ** 2, axis=-1), axis=1), wanted)
        helpers.assert_close(merged.value_lost, values, 1e-9)
        gained = merged.attention["out"]["bias"] - attention["out"]["bias"]
        helpers.assert_close(means.sum(axis=(0, 1)), gained, 1e-9)
        key_losses[rule], value_losses[rule] = keys, values
    pooled = naive_mean_pooled(attention, wanted)
    key_losses["mean"] = by_group(naive_key_error(x, attention, pooled), wanted)
    errors = naive_value_errors(x, attention, pooled)
    value_losses["mean"] = by_group(np.mean(np.sum(errors**2, axis=-1), axis=1), wanted)
    for losses in (key_losses, value_losses):
        assert (losses["svd"] < losses["procrustes"]).all()
        assert (losses["svd"] < losses["mean"]).all()


def test_lost_keys_are_the_discarded_eigenvalues():
    """Eckart-Young by singular values of all logits at once, without any square root of moments."""
    x = structured_tokens(images=6, length=8)
    attention = random_layer(6)
    merged = convert.merge_heads(attention, 3, convert.InputMoments.of(x))
    for k in range(3):
        q, keys = (
            [helpers.project(x, attention, name)[:, :, n] for n in (2 * k, 2 * k + 1)]
            for name in ("query", "key")
        )
        keys = [(a - a.mean(1, keepdims=True)).reshape(-1, H) for a in keys]
        logits = np.concatenate([a.reshape(-1, H) @ b.T for a, b in zip(q, keys, strict=True)])
        values = np.linalg.svd(logits, compute_uv=False) ** 2 / len(keys[0]) ** 2
        helpers.assert_close(merged.key_lost[k], values[H:].sum(), 1e-5)
        share = values[:H].sum() / values.sum()
        helpers.assert_close(merged.keys_kept[k], share, 1e-6)


def test_grouped_heads_merge_like_the_heads_that_they_stand_for():
    """Three key/value heads for six query heads lose what their six copies would."""
    grouped, x = random_layer(8, kv_heads=3), structured_tokens(images=10)
    copied = {**grouped}
    for name in ("key", "value"):
        copied[name] = {leaf: np.repeat(a, 2, axis=-2) for leaf, a in grouped[name].items()}
    moments = convert.InputMoments.of(x)
    few, many = (convert.merge_heads(a, 1, moments) for a in (grouped, copied))
    # The floor under eigenvalues is a share of each head's largest, so they are not bit-equal.
    helpers.assert_close(few.key_lost, many.key_lost, 1e-9)
    helpers.assert_close(few.value_lost, many.value_lost, 1e-9)
    a, b = (naive_logits(x, m.attention) for m in (few, many))
    helpers.assert_close(a, b, 1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_without_data_like_with_data_of_that_distribution(rule):
    """Moments of n = 10,000 tokens differ from their expectation by 1/sqrt(n) = 1 %."""
    attention = random_layer(9)
    rng = np.random.default_rng(10)
    scale, bias = np.exp(rng.standard_normal(D)), 0.5 * rng.standard_normal(D)
    x = scale * rng.standard_normal((400, 25, D)) + bias
    moments = convert.InputMoments.of(x)
    calibrated = convert.merge_heads(attention, 2, moments, rule)
    free = convert.merge_heads(attention, 2, convert.data_free_moments(scale, bias), rule)
    helpers.assert_close(free.keys_kept, calibrated.keys_kept, 0.01)
    helpers.assert_close(free.values_kept, calibrated.values_kept, 0.01)
    # Near its optimum the loss is flat: errors of the moments count squared.
    best, lost = (
        by_group(naive_key_error(x[:30], attention, m.attention), 2) for m in (calibrated, free)
    )
    helpers.assert_close(lost, best, 0.02)
    biases = (x.attention["out"]["bias"].std() for x in (free, calibrated))
    helpers.assert_close(*biases, 0.1)


# --- what goes wrong elsewhere ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dead", ["query", "key", "value", "out", "all"])
def test_dead_heads(rule, dead):
    """Head 2 is dead; then its partner, head 3, has the shared head to itself."""
    attention = random_layer(11)
    for name in ("query", "key", "value", "out") if dead == "all" else (dead,):
        kernel = attention[name]["kernel"]
        kernel[(2,) if name == "out" else (slice(None), 2)] = 0.0
        if dead == "all" and name != "out":
            attention[name]["bias"][2] = 0.0
        if dead == "query":
            attention[name]["bias"][2] = 0.0
    x = structured_tokens(images=10)
    merged = convert.merge_heads(attention, 3, convert.InputMoments.of(x), rule)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(merged.attention))
    assert np.abs(merged.attention["query"]["kernel"]).max() < 10
    if rule == "svd" and dead in ("query", "key", "all"):
        error = naive_key_error(x, attention, merged.attention)
        helpers.assert_close(error[2:4], 0.0, 1e-6, scale=error.max())
    if rule == "svd" and dead in ("value", "out", "all"):
        helpers.assert_close(merged.values_kept[1], 1.0, 1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_that_is_all_zero(rule):
    attention = jax.tree.map(np.zeros_like, random_layer())
    merged = convert.merge_heads(
        attention, 2, convert.InputMoments.of(structured_tokens(images=2)), rule
    )
    assert all(not a.any() for a in jax.tree.leaves(merged.attention))
    np.testing.assert_array_equal(merged.keys_kept, 1.0)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_fewer_tokens_than_the_head_width(noise):
    """Five tokens of one image span less than H: exact on them, and no nonsense on others.

    The noise is that of sums in float32; it must not decide about what five tokens leave open.
    """
    attention = random_layer(12)
    x = structured_tokens(images=1, length=5)
    moments = convert.InputMoments.of(x)
    size = np.sqrt(np.outer(*2 * [np.diag(moments.within)]))
    rounding = noise * size * np.random.default_rng(0).standard_normal((D, D))
    moments.within += (rounding + rounding.T) / 2
    merged = convert.merge_heads(attention, 3, moments)
    helpers.assert_close(naive_logits(x, merged.attention), naive_logits(x, attention), 1e-5)
    helpers.assert_close(merged.keys_kept, 1.0, 1e-6)
    others = structured_tokens(13)
    energy = naive_key_error(others, attention, jax.tree.map(np.zeros_like, attention))
    error = naive_key_error(others, attention, merged.attention)
    assert error.sum() < 0.5 * energy.sum()


def test_one_token_an_image():
    """Keys cannot differ within an image; nothing is lost, and nothing breaks."""
    moments = convert.InputMoments.of(structured_tokens(images=4, length=1))
    merged = convert.merge_heads(random_layer(12), 3, moments)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(merged.attention))
    np.testing.assert_array_equal(merged.keys_kept, 1.0)


def test_directions_that_nothing_uses_are_not_blown_up():
    """An inverse square root is at most that of the floor, whatever rounding leaves of a zero."""
    weight = np.diag([4.0, 0.0, 1e-30, -1e-16])
    moment = np.eye(8).reshape(2, 4, 2, 4)
    encoders, decoders = convert.MERGING["svd"](moment, np.stack([weight, weight]))
    assert np.isfinite(encoders).all()
    assert max(np.linalg.norm(x, ord=2) for x in decoders) <= 1.001 / np.sqrt(1e-6 * 4.0)


def test_bad_requests_are_refused():
    attention, x = random_layer(), structured_tokens(images=2)
    moments = convert.InputMoments.of(x)
    with pytest.raises(UserError, match="6 key/value heads cannot be pooled into 4"):
        convert.merge_heads(attention, 4, moments)
    with pytest.raises(UserError, match="unknown merging rule 'svt': did you mean 'svd'"):
        convert.merge_heads(attention, 3, moments, "svt")
    with pytest.raises(UserError, match="hold no tokens"):
        convert.merge_heads(attention, 3, convert.InputMoments.empty(D))
    with pytest.raises(UserError, match="moments of 7 features do not fit a layer of width 48"):
        convert.merge_heads(attention, 3, convert.InputMoments.of(x[..., :7]))
    x[0, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        convert.merge_heads(attention, 3, convert.InputMoments.of(x))


# --- balancing ----------------------------------------------------------------------------------


def test_balancing_keeps_the_function_and_equalises_the_norms():
    attention = random_layer(14, kv_heads=3)
    rng = np.random.default_rng(15)
    skewed = jax.tree.map(np.copy, attention)
    for one, many in (("key", "query"), ("value", "out")):
        factor = np.exp(3 * rng.standard_normal((3, H)))
        for leaf in ("kernel", "bias"):
            skewed[one][leaf] = skewed[one][leaf] * factor
        back = np.repeat(factor, 2, axis=0)
        if many == "query":
            skewed[many] = {leaf: a / back for leaf, a in skewed[many].items()}
        else:
            skewed[many]["kernel"] = skewed[many]["kernel"] / back[..., None]
    balanced = convert.balance_heads(skewed)
    assert_same_function(structured_tokens(images=3), attention, balanced)
    for one, many, axis in (("key", "query", 0), ("value", "out", 2)):
        kernel = balanced[one]["kernel"]
        served = np.sum(balanced[many]["kernel"] ** 2, axis=axis).reshape(3, 2, H).mean(1)
        helpers.assert_close(np.sum(kernel**2, axis=0), served, 1e-9)


def test_merged_weights_have_ordinary_magnitudes():
    attention = random_layer(16)
    moments = convert.InputMoments.of(structured_tokens())
    merged = convert.merge_heads(attention, 2, moments).attention
    before, after = (
        max(np.abs(x["kernel"]).max() for x in a.values()) for a in (attention, merged)
    )
    assert after < 2 * before
    rms = [
        np.sum(merged[n]["kernel"] ** 2, axis=0).reshape(2, -1, H).mean(1) for n in ("key", "query")
    ]
    helpers.assert_close(rms[0], rms[1], 1e-6)


# --- a BERT encoder's attention -----------------------------------------------------------------


def naive_bert_attention(x, mask, weights, heads):
    """Self-attention and its output projection of BERT, by transformers' names."""
    batch, length, width = x.shape
    head = width // heads
    q, k, v = (
        (x @ weights[f"self.{name}.weight"].T + weights[f"self.{name}.bias"])
        .reshape(batch, length, -1, head)
        for name in ("query", "key", "value")
    )  # fmt: skip
    index = np.arange(heads) * k.shape[2] // heads
    context = helpers.naive_attention(q, k, v, index, mask[:, None, None])[0]
    dense = weights["output.dense.weight"], weights["output.dense.bias"]
    return context.reshape(batch, length, width) @ dense[0].T + dense[1]


def test_attention_of_bert_keeps_its_output():
    """Arrays in PyTorch's layout in and out, sentences of different lengths."""
    rng = np.random.default_rng(30)
    weights = {}
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        weights[f"{name}.weight"] = 0.2 * rng.standard_normal((D, D))
        weights[f"{name}.bias"] = 0.2 * rng.standard_normal(D)
    for name in ("key", "value"):  # each pair of heads of joint rank H
        rows = weights[f"self.{name}.weight"].reshape(3, 2 * H, D)
        rows[:] = rng.standard_normal((3, 2 * H, H)) @ rows[:, :H]
    x = structured_tokens(31, images=4, length=9)
    mask = np.arange(9) < np.array([9, 4, 6, 2])[:, None]

    attention = {
        name: {"kernel": weights[f"self.{name}.weight"].T.reshape(D, N, H),
               "bias": weights[f"self.{name}.bias"].reshape(N, H)}
        for name in ("query", "key", "value")
    }  # fmt: skip
    attention["out"] = {"kernel": weights["output.dense.weight"].T.reshape(N, H, D),
                        "bias": weights["output.dense.bias"]}  # fmt: skip
    merged = convert.merge_heads(attention, 3, convert.InputMoments.of(x, mask)).attention
    new = {"output.dense.weight": merged["out"]["kernel"].reshape(D, D).T,
           "output.dense.bias": merged["out"]["bias"]}  # fmt: skip
    for name in ("query", "key", "value"):
        new[f"self.{name}.weight"] = merged[name]["kernel"].reshape(D, -1).T
        new[f"self.{name}.bias"] = merged[name]["bias"].reshape(-1)
    before, after = (naive_bert_attention(x, mask, w, N) for w in (weights, new))
    helpers.assert_close(after[mask], before[mask], 1e-9)
