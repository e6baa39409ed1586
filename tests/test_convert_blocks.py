"""Grouping, merging and refitting for every kind of block: against numpy, and what is refused."""

import functools

import helpers
import jax
import numpy as np
import pytest
from helpers import N
from merging_helpers import (
    assert_same_function,
    by_group,
    naive_key_error,
    naive_logits,
    naive_value_errors,
    random_layer,
    structured_tokens,
)

from kdgqa_jax import block, convert, vit
from kdgqa_jax.errors import UserError
from kdgqa_jax.heads import refitting

NO_BIAS = {"qkv_bias": False, "proj_bias": False}
KINDS = {
    "layer_scale": {"layer_scale": 1.0, "pre_norm": True, "reg_tokens": 2, "head_width": 12},
    "parallel": {"block": "parallel", "layer_scale": 1.0, "norm": "rmsnorm", **NO_BIAS},
    "post_norm": {"block": "post_norm", "pool": "map"},
    "qk_norm": {"block": "parallel", "qk_norm": True, "qkv_bias": False, "no_embed_class": True},
    "scale_attn_norm": {"scale_attn_norm": True, "norm": "rmsnorm", "proj_bias": False},
}
STRENGTH = 1e-2


def test_every_order_of_a_block_has_its_row():
    assert refitting.FOLLOWED.keys() == block.ORDERS.keys()


class Case:
    """A model of a kind, its activations on some images, and the same with three heads."""

    def __init__(self, kind):
        self.options = KINDS[kind]
        self.before, self.after = (helpers.tiny_vit(v, **self.options) for v in ("mha", "gqa"))
        self.params = jax.device_get(helpers.vit_variables(self.before)["params"])
        self.images = helpers.images(6, seed=3) + 0.5
        self.moments = convert.gather_moments(
            self.before, {"params": self.params}, self.images, batch_size=4
        )

    @functools.cached_property
    def activations(self):
        return activations(self.before, self.params, self.images)


@functools.partial(helpers.fast_jit, static_argnums=0)
def _run(model, params, images):
    def blocks_and_mlps(module, method):
        return type(module).__name__ in ("Block", "Mlp") and method == "__call__"

    return model.apply(
        {"params": params},
        images,
        mutable=["inputs", "intermediates"],
        capture_intermediates=blocks_and_mlps,
    )


def activations(model, params, images):
    """Logits, and of every layer: what attention sees, its heads, what MLP and block give."""
    logits, found = jax.device_get(_run(model, params, images))
    layers = []
    for i in range(model.depth):
        inputs, seen = (found[name][f"blocks_{i}"] for name in ("inputs", "intermediates"))
        layers.append(
            {
                **{name: np.float64(x) for name, x in inputs["attn"].items()},
                "out": np.float64(seen["__call__"][0][0]),
                "mlp": np.float64(seen["mlp"]["__call__"][0]),
            }
        )
    return logits, layers


@pytest.fixture(scope="module", params=list(KINDS))
def case(request):
    return Case(request.param)


def scale_of(layer):
    return np.asarray(layer.get("ls1", 1.0), np.float64)


def given(heads, layer):
    """What attention gives from its heads, with LayerScale, in float64."""
    out = {leaf: np.float64(x) for leaf, x in layer["attn"]["out"].items()}
    given = np.einsum("BTNH,NHD->BTD", heads, out["kernel"]) + out.get("bias", 0.0)
    return given * scale_of(layer)


def grouped(case, pooling, **options):
    variables = {"params": case.params}
    return convert.group_heads(case.before, variables, case.after, pooling, **options)


# --- the whole model ----------------------------------------------------------------------------


def test_shapes_are_those_of_the_grouped_model(case):
    shapes = jax.tree.map(np.shape, vit.variable_shapes(case.after, 1)["params"])
    for pooling in ("mean", "first", "random", "svd", "procrustes"):
        images = case.images if pooling in convert.MERGING else None
        found = grouped(case, pooling, images=images).params
        assert jax.tree.map(np.shape, found) == shapes, pooling
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_as_many_heads_change_nothing(case):
    same, _ = convert.to_merged(case.params, N, case.moments)
    jax.tree.map(np.testing.assert_array_equal, same, case.params)
    jax.tree.map(np.testing.assert_array_equal, convert.to_grouped(case.params, N), case.params)
    variables = {"params": case.params}
    after = helpers.tiny_vit("gqa", num_kv_heads=N, **case.options)
    found = convert.group_heads(
        case.before, variables, after, "svd", images=case.images, refit=True
    )
    assert "refitted with 6 images" in found.notes[-1]
    logits, _ = jax.device_get(_run(after, found.params, case.images))
    helpers.assert_close(logits, case.activations[0], 1e-5)


def test_heads_that_have_much_in_common_keep_the_logits(case):
    """Where maps go through, groups of joint rank H; where norms stop them, groups of equal heads.

    Value biases lie in the joint range, so that they are kept without an output bias, too.
    """
    params, rng = jax.tree.map(np.array, case.params), np.random.default_rng(5)
    for i in range(2):
        attention = params[f"blocks_{i}"]["attn"]
        for name, norm in (("key", "q_norm"), ("value", "norm")):
            width = attention[name]["kernel"].shape[-1]
            mix = 0.4 * rng.standard_normal((N, width, width))
            for leaf, x in attention[name].items():
                first = np.repeat(x[..., ::2, :], 2, axis=-2)
                alike = first if norm in attention else np.einsum("...jh,jhe->...je", first, mix)
                attention[name][leaf] = np.float32(alike)
    before, after = {"params": params}, case.after
    expected, layers = activations(case.before, params, case.images)
    assert np.ptp(expected) > 0.1 and all(np.ptp(x["heads"]) > 0.1 for x in layers)
    found = convert.group_heads(case.before, before, after, "svd", images=case.images)
    logits, _ = activations(after, found.params, case.images)
    helpers.assert_close(logits, expected, 3e-5)
    least = [min(kept) for layer in found.energy_kept.values() for kept in layer.values()]
    assert min(least) > 1 - 1e-6


def test_energy_that_is_reported_equals_that_of_all_tokens(case):
    merged, said = convert.to_merged(case.params, 3, case.moments)
    for i, (name, layer) in enumerate(said.items()):
        x = case.activations[1][i]["x"]
        attention, scale = case.params[name]["attn"], scale_of(case.params[name])
        nothing = jax.tree.map(np.zeros_like, attention)
        if "q_norm" in attention:
            assert layer.keys_kept is None
        else:
            lost, energy = (
                by_group(naive_key_error(x, attention, other), 3)
                for other in (merged[name]["attn"], nothing)
            )
            helpers.assert_close(layer.key_energy, energy, 1e-4)
            helpers.assert_close(layer.keys_kept, 1 - lost / energy, 1e-4)
        if "norm" in attention:
            assert layer.values_kept is None
            continue
        lost, energy = (
            value_energy(scale * naive_value_errors(x, attention, other), attention)
            for other in (merged[name]["attn"], nothing)
        )
        helpers.assert_close(layer.value_energy, energy, 1e-4)
        helpers.assert_close(layer.values_kept, 1 - lost / energy, 1e-4)


def value_energy(errors, attention):
    if "bias" in attention["out"]:
        errors = errors - errors.mean(axis=1, keepdims=True)
    return by_group(np.mean(np.sum(errors**2, axis=-1), axis=1), 3)


def test_refit_solves_for_what_follows_the_original(case):
    """Of both layers, from the activations of both models: one least-squares problem each."""
    pooled = convert.to_grouped(case.params, 3)
    fitted, missed = convert.refit_outputs(
        case.before, {"params": case.params}, case.after, {"params": pooled}, case.images,
        batch_size=4, strength=STRENGTH,
    )  # fmt: skip
    _, theirs = case.activations
    _, ours = activations(case.after, fitted, case.images)
    for i in range(2):
        name = f"blocks_{i}"
        target = given(theirs[i]["heads"], case.params[name])
        scale = scale_of(pooled[name])
        if i and case.before.block.block != "post_norm":
            target = target + theirs[0]["out"] - ours[0]["out"]
        if i and case.before.block.block == "parallel":
            target = target + scale * (theirs[1]["mlp"] - ours[1]["mlp"])
        a = ours[i]["heads"].reshape(-1, ours[i]["heads"][0, 0].size)
        y = target.reshape(len(a), -1)
        projection = pooled[name]["attn"]["out"]
        kernel = scale * np.float64(projection["kernel"]).reshape(a.shape[1], -1)
        offset = np.zeros(a.shape[1]), np.zeros(y.shape[1])
        if "bias" in projection:
            offset = a.mean(0), y.mean(0)
        a, y = a - offset[0], y - offset[1]
        root = np.sqrt(STRENGTH * np.sum(a**2) / a.shape[1]) * np.eye(a.shape[1])
        rows, wanted = np.concatenate([a, root]), np.concatenate([y, root @ kernel])
        expected = np.linalg.lstsq(rows, wanted)[0]
        found = fitted[name]["attn"]["out"]
        helpers.assert_close(found["kernel"].reshape(expected.shape) * scale, expected, 1e-3)
        if "bias" in projection:
            bias = offset[1] - offset[0] @ expected
            helpers.assert_close(found["bias"] * scale, bias, 1e-3)
        share = np.sum((y - a @ expected) ** 2) / np.sum(y**2)
        helpers.assert_close(missed[name][1], share, 1e-3)
        assert missed[name][1] < 0.8 * missed[name][0]


def test_reports_say_what_was_averaged(case):
    found = grouped(case, "svd", images=case.images, refit=True)
    notes = "; ".join(found.notes)
    attention = case.params["blocks_0"]["attn"]
    assert ("key heads averaged, not merged: qk_norm" in notes) == ("q_norm" in attention)
    assert ("value heads averaged, not merged: scale_attn_norm" in notes) == ("norm" in attention)
    assert ("of keys" in notes) == ("q_norm" not in attention) == ("query" in found.how)
    assert ("of values" in notes) == ("norm" not in attention)
    assert ("to the norm after it" in notes) == (case.before.block.block == "post_norm")


# --- without data, and refusals -----------------------------------------------------------------


def test_without_data_by_the_scales_of_norms(case):
    if case.before.block.block == "post_norm":
        with pytest.raises(UserError, match="post_norm do not normalise what attention sees"):
            grouped(case, "svd")
        return
    found = grouped(case, "svd")
    assert "without data" in found.notes[-1]
    for name in ("blocks_0", "blocks_1"):
        layer = case.params[name]
        norm = layer["norm1"]
        rng = np.random.default_rng(1)
        width = len(norm["scale"])
        x = norm["scale"] * rng.standard_normal((400, 20, width)) + norm.get("bias", 0.0)
        drawn = convert.merge_heads(
            layer["attn"], 3, convert.InputMoments.of(x), "svd", layer.get("ls1")
        )
        for side, shares in found.energy_kept[name].items():
            expected = drawn.keys_kept if side == "keys" else drawn.values_kept
            helpers.assert_close(np.array(shares), expected, 0.01)


def test_nothing_to_merge_is_refused():
    before, after = (
        helpers.tiny_vit(v, qk_norm=True, scale_attn_norm=True, depth=1) for v in ("mha", "gqa")
    )
    variables = jax.device_get(helpers.vit_variables(before))
    with pytest.raises(UserError, match=r"with qk_norm and scale_attn_norm, .* pooling 'mean'"):
        convert.group_heads(before, variables, after, "svd")
    found = convert.group_heads(before, variables, after, "mean").params
    assert found["blocks_0"]["attn"]["key"]["kernel"].shape == (48, 3, 8)


def test_suggestions_count_what_is_merged(tmp_path):
    from convert_helpers import model_directory

    merged = model_directory(tmp_path / "a", "mha", qk_norm=True, depth=1, layer_scale=1.0)
    rows, said = convert.suggest_kv_heads(merged, 0.5)
    assert rows[0][2] == "" and 50 <= float(rows[0][3]) <= 100
    assert "key heads, which qk_norm has averaged, are not counted" in said
    nothing = {"qk_norm": True, "scale_attn_norm": True, "depth": 1}
    with pytest.raises(UserError, match="nothing to merge in layers with qk_norm and scale"):
        convert.suggest_kv_heads(model_directory(tmp_path / "b", "mha", **nothing), 0.5)
    unnormalised = model_directory(tmp_path / "c", "mha", block="post_norm", depth=1)
    with pytest.raises(UserError, match="post_norm do not normalise"):
        convert.suggest_kv_heads(unnormalised, 0.5)


# --- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(convert.MERGING))
def test_layer_scale_counts_as_part_of_the_output_projection(rule):
    attention, x = random_layer(3), structured_tokens(images=5)
    scale = np.exp(2 * np.random.default_rng(4).standard_normal(x.shape[-1]))
    scale[:5] = 0.0
    folded = {**attention, "out": {leaf: a * scale for leaf, a in attention["out"].items()}}
    moments = convert.InputMoments.of(x)
    one = convert.merge_heads(attention, 3, moments, rule, scale)
    two = convert.merge_heads(folded, 3, moments, rule)
    helpers.assert_close(one.value_lost, two.value_lost, 1e-9)
    helpers.assert_close(one.values_kept, two.values_kept, 1e-9)
    outs = [helpers.naive_layer(x, m.attention, np.repeat(np.arange(3), 2)) for m in (one, two)]
    helpers.assert_close(outs[0] * scale, outs[1], 1e-9)


def test_refitting_before_layer_scale_is_refitting_the_folded_projection():
    """A channel that LayerScale closes stays as it was."""
    options = {"layer_scale": 1.0, "depth": 1}
    before, after = (helpers.tiny_vit(v, **options) for v in ("mha", "gqa"))
    plain = [helpers.tiny_vit(v, depth=1) for v in ("mha", "gqa")]
    params = jax.tree.map(np.array, helpers.vit_variables(before)["params"])
    params["blocks_0"]["ls1"][7] = 0.0

    def folded(params):
        layer = dict(params["blocks_0"])
        scale, last = layer.pop("ls1"), layer.pop("ls2")
        out = {leaf: x * scale for leaf, x in layer["attn"]["out"].items()}
        fc2 = {leaf: x * last for leaf, x in layer["mlp"]["fc2"].items()}
        attention, mlp = {**layer["attn"], "out": out}, {**layer["mlp"], "fc2": fc2}
        return {**params, "blocks_0": {**layer, "attn": attention, "mlp": mlp}}

    pooled, images = convert.to_grouped(params, 3), helpers.images(6)
    stiff = {"images": images, "strength": 0.1}  # float32 sums decide about little
    one, _ = convert.refit_outputs(before, {"params": params}, after, {"params": pooled}, **stiff)
    two, _ = convert.refit_outputs(
        plain[0], {"params": folded(params)}, plain[1], {"params": folded(pooled)}, **stiff
    )
    helpers.assert_close(folded(one)["blocks_0"]["attn"], two["blocks_0"]["attn"], 1e-4)
    for leaf, x in one["blocks_0"]["attn"]["out"].items():
        np.testing.assert_array_equal(x[..., 7], pooled["blocks_0"]["attn"]["out"][leaf][..., 7])


@pytest.mark.parametrize("rule", list(convert.MERGING))
@pytest.mark.parametrize("biases", [("value", "query", "key"), ()])
def test_without_an_output_bias_means_are_merged_too(rule, biases):
    """Losses count the means, and no array appears that was not there."""
    attention, x = random_layer(6), structured_tokens(images=8) + 0.3
    for name in {"query", "key", "value", "out"} - set(biases):
        del attention[name]["bias"]
    merged = convert.merge_heads(attention, 2, convert.InputMoments.of(x), rule)
    assert jax.tree.structure(merged.attention) == jax.tree.structure(attention)
    errors = naive_value_errors(x, attention, merged.attention)
    lost = by_group(np.mean(np.sum(errors**2, axis=-1), axis=1), 2)
    helpers.assert_close(merged.value_lost, lost, 1e-9)


def test_without_an_output_bias_svd_is_best_for_values_with_their_means():
    """The same layer merged as if a bias could hold the means loses more."""
    attention, x = random_layer(6), structured_tokens(images=8) + 1.0
    moments = convert.InputMoments.of(x)
    absorbed = convert.merge_heads(attention, 2, moments).attention
    del attention["out"]["bias"], absorbed["out"]["bias"]
    kept = convert.merge_heads(attention, 2, moments).attention
    one, two = (
        np.sum(naive_value_errors(x, attention, merged) ** 2) for merged in (kept, absorbed)
    )
    assert one < 0.9 * two


def test_norms_that_stop_a_map_leave_the_other_projection_alone():
    attention, x = random_layer(7), structured_tokens(images=4)
    moments = convert.InputMoments.of(x)
    plain = convert.merge_heads(attention, 3, moments).attention
    scales = {"scale": np.ones(8), "bias": np.zeros(8)}
    keys = {**attention, "q_norm": scales, "k_norm": scales}
    merged = convert.merge_heads(keys, 3, moments).attention
    for name in ("query", "q_norm", "k_norm"):
        jax.tree.map(np.testing.assert_array_equal, merged[name], keys[name])
    mean = np.asarray(convert.pool_heads(attention["key"]["kernel"], 3))
    helpers.assert_close(merged["key"]["kernel"], mean, 1e-6)
    for name in ("value", "out"):
        helpers.assert_close(merged[name], plain[name], 1e-12)
    values = {**attention, "norm": {"scale": np.ones(48)}}
    merged = convert.merge_heads(values, 3, moments).attention
    helpers.assert_close(naive_logits(x, merged), naive_logits(x, plain), 1e-9)
    jax.tree.map(np.testing.assert_array_equal, merged["out"], attention["out"])
    assert_same_function(x, merged, convert.balance_heads(merged))
