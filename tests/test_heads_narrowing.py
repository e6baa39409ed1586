"""Heads made narrower: layers against singular value decompositions, models, files, training."""

import json

import helpers
import jax
import numpy as np
import pytest
from convert_helpers import model_directory
from helpers import D, H, N
from merging_helpers import of_low_rank, random_layer, structured_tokens
from test_train import assert_same, final_state, interrupt, tiny_config

from kdgqa_jax import checkpoint, cli, convert, train, tree_utils, vit
from kdgqa_jax.errors import UserError

# --- one layer ----------------------------------------------------------------------------------


def products(attention, scale=1.0, bias=0.0):
    """Logit and value products of each head for tokens scale * u + bias: (N, D+1, D), (N, D, D).

    The last row of the first is the part of the queries that no token moves. What all keys share
    is left out: softmax does not see it.
    """
    q, k, v = (attention[name]["kernel"] for name in ("query", "key", "value"))
    constant = np.tensordot(bias * np.ones(D), q, 1) + attention["query"]["bias"]
    q = np.concatenate([np.reshape(scale * np.ones(D), (D, 1, 1)) * q, constant[None]])
    k, v = (np.reshape(scale * np.ones(D), (D, 1, 1)) * x for x in (k, v))
    k, v = (np.repeat(x, N // x.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("dnh,enh->nde", q, k) / np.sqrt(q.shape[2])
    return logits, np.einsum("dnh,nhe->nde", v, attention["out"]["kernel"])


@pytest.mark.parametrize("widths", [(5, 5), (H - 1, 2), (1, H), (H, 3)])
def test_errors_without_data_are_the_discarded_singular_values(widths):
    before, rng = random_layer(1), np.random.default_rng(2)
    scale, bias = np.exp(0.3 * rng.standard_normal(D)), 0.3 * rng.standard_normal(D)
    moments = convert.data_free_moments(scale, bias)
    merged = convert.merge_heads(before, N, moments, head_width=widths[0], v_head_width=widths[1])
    assert merged.attention["query"]["kernel"].shape == (D, N, widths[0])
    assert merged.attention["out"]["kernel"].shape == (N, widths[1], D)
    ours = products(merged.attention, scale, bias)
    theirs = products(before, scale, bias)
    reported = (merged.key_lost / H, merged.value_lost)  # of logits before the division by sqrt H
    for mine, original, width, lost in zip(ours, theirs, widths, reported, strict=True):
        singular = np.linalg.svd(original, compute_uv=False)
        discarded = np.square(singular[:, width:]).sum(1)
        energy = np.square(singular).sum(1)
        error = np.square(mine - original).sum((1, 2))
        helpers.assert_close(error, discarded, 1e-9, scale=energy.max())
        helpers.assert_close(lost, discarded, 1e-9, scale=energy.max())
        assert width == H or discarded.min() > 1e-3 * energy.max()


def test_heads_that_serve_several_query_heads_pay_for_all_of_them():
    """Products of a group side by side have one decomposition."""
    before, width = random_layer(3, kv_heads=3), 4
    moments = convert.data_free_moments(np.ones(D))
    merged = convert.merge_heads(before, 3, moments, head_width=width)
    logits, values = products(before)
    ours, our_values = products(merged.attention)
    stacked = logits.reshape(3, 2 * (D + 1), D)
    discarded = np.square(np.linalg.svd(stacked, compute_uv=False)[:, width:]).sum(1)
    error = np.square(ours - logits).sum((1, 2)).reshape(3, 2).sum(1)
    helpers.assert_close(error, discarded, 1e-9, scale=np.square(logits).sum())
    np.testing.assert_array_equal(our_values, values)  # nothing was asked for there


def outputs(attention, x):
    """What a layer gives, by the model's own code in float32."""
    shapes = [attention[name]["kernel"].shape for name in ("key", "value")]
    module = helpers.layer(
        "gqa", num_kv_heads=shapes[0][1], head_width=shapes[0][2], v_head_width=shapes[1][2]
    )
    params = jax.tree.map(np.float32, dict(attention))
    return np.asarray(helpers.fast_jit(lambda p, x: module.apply({"params": p}, x))(params, x))


def test_heads_of_low_rank_lose_nothing():
    """Scale, biases and means too: what attention gives is the same to 1e-5."""
    before, width = random_layer(4), 3
    rng = np.random.default_rng(5)
    for name in ("key", "value"):
        kernel = before[name]["kernel"]
        turn = rng.standard_normal((N, width, H))
        before[name]["kernel"] = np.einsum("dnh,nhe->dne", kernel[:, :, :width], turn)
    x = structured_tokens(6, images=4)
    moments = convert.InputMoments.of(x)
    for wanted in (width, H):
        merged = convert.merge_heads(before, N, moments, head_width=wanted, v_head_width=wanted)
        helpers.assert_close(outputs(merged.attention, x), outputs(before, x), 1e-5)


def test_full_width_changes_nothing():
    before = random_layer(7)
    merged = convert.merge_heads(
        before, N, convert.data_free_moments(np.ones(D)), head_width=H, v_head_width=H
    )
    jax.tree.map(np.testing.assert_array_equal, merged.attention, before)
    assert not merged.key_lost.any() and not merged.value_lost.any()


def logit_error(x, before, after):
    """Mean square of what logits differ by, every query with every key, rows centred."""
    errors = 0.0
    for n in range(N):
        logits = []
        for attention in (before, after):
            q, k = (helpers.project(x, attention, name) for name in ("query", "key"))
            k = k[:, :, n * k.shape[2] // N]
            k = np.concatenate([keys - keys.mean(0) for keys in k])
            logits.append(q[:, :, n].reshape(-1, k.shape[-1]) @ k.T / np.sqrt(k.shape[-1]))
        errors += np.mean(np.square(logits[0] - logits[1]))
    return errors


def test_calibrated_heads_are_better_on_what_they_saw():
    before, x = random_layer(8), structured_tokens(9)
    saw, nothing = convert.InputMoments.of(x), convert.data_free_moments(np.ones(D))
    ours, free = (
        convert.merge_heads(before, N, moments, head_width=4, v_head_width=4).attention
        for moments in (saw, nothing)
    )
    assert logit_error(x, before, ours) < 0.9 * logit_error(x, before, free)
    added = [
        np.einsum("BTNH,NHD->BTND", helpers.project(x, a, "value"), a["out"]["kernel"])
        for a in (before, ours, free)
    ]
    spread = [np.var((a - added[0]).reshape(-1, N, D), axis=0).sum() for a in added[1:]]
    assert spread[0] < 0.9 * spread[1]


def test_fewer_and_narrower_at_once_beats_one_after_the_other():
    before, moments = random_layer(10), convert.InputMoments.of(structured_tokens(11))
    widths = {"head_width": 5, "v_head_width": 6}
    at_once = convert.merge_heads(before, 3, moments, **widths)
    fewer = convert.merge_heads(before, 3, moments)
    in_turn = convert.merge_heads(fewer.attention, 3, moments, **widths)
    for side in ("key", "value"):
        once, first, then = (getattr(x, f"{side}_lost").sum() for x in (at_once, fewer, in_turn))
        assert first < once <= (first + then) * (1 + 1e-6)


def test_joint_rank_of_a_group_is_what_counts():
    before = of_low_rank(random_layer(12), 2)
    merged = convert.merge_heads(before, 2, convert.InputMoments.of(structured_tokens(13)))
    assert merged.keys_kept.min() > 1 - 1e-9
    narrow = convert.merge_heads(
        before, 2, convert.InputMoments.of(structured_tokens(13)), head_width=H - 1
    )
    assert narrow.keys_kept.max() < 1 - 1e-4


@pytest.mark.parametrize(
    "widths, rule, more, says",
    [
        ({"head_width": H + 1}, "svd", (), "key heads of width 8 cannot become 9 wide"),
        ({"v_head_width": 0}, "svd", (), "value heads of width 8 cannot become 0 wide"),
        ({"head_width": 4}, "procrustes", (), "procrustes leaves heads as wide as they are"),
        ({"head_width": 4}, "svd", ("q_norm", "k_norm"), "qk_norm.*v_head_width"),
        ({"v_head_width": 4}, "svd", ("norm",), "scale_attn_norm.*head_width"),
    ],
)
def test_widths_that_cannot_be_had_are_refused(widths, rule, more, says):
    layer = random_layer() | {name: {"scale": np.ones(H)} for name in more}
    with pytest.raises(UserError, match=says):
        convert.merge_heads(layer, N, convert.data_free_moments(np.ones(D)), rule, **widths)


# --- a model ------------------------------------------------------------------------------------


def test_models_of_every_variant_take_widths():
    images = helpers.images(2)
    for attention in ("mha", *helpers.GROUPED):
        model = helpers.tiny_vit(attention, depth=1, head_width=5, v_head_width=3)
        variables = helpers.vit_variables(model)
        attn = variables["params"]["blocks_0"]["attn"]
        shapes = {name: attn[name]["kernel"].shape[-2:] for name in ("query", "key", "value")}
        heads = model.attention.num_kv_heads
        assert shapes == {"query": (N, 5), "key": (heads, 5), "value": (heads, 3)}
        assert attn["out"]["kernel"].shape == (N, 3, D)
        assert np.isfinite(vit.apply_in_evaluation(model, variables, images)[0]).all()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A multi-head model directory; heads of the first layer are of rank 4."""
    path = tmp_path_factory.mktemp("narrow") / "mha"
    model_directory(path, "mha")
    _, variables, description = checkpoint.load_model(path)
    variables = jax.tree.map(np.array, variables)
    for layer in ("blocks_0", "blocks_1"):
        for name in ("key", "value"):
            kernel = variables["params"][layer]["attn"][name]["kernel"]
            turn = np.random.default_rng(0).standard_normal((N, 4, H)) / 2
            kernel[:] = np.einsum("dnh,nhe->dne", kernel[:, :, :4], turn)
    checkpoint.save_model(path.with_name("low"), variables, description)
    return path.with_name("low")


def logits_of(converted):
    model, variables = converted.model, converted.variables
    return np.asarray(vit.apply_in_evaluation(model, variables, helpers.images(3))[0])


def test_conversion_keeps_logits_where_heads_are_of_low_rank(source):
    whole = logits_of(convert.load(source))
    narrow = convert.load(source, pooling="width", head_width=4)
    assert narrow.model.attention.variant == "mha" and narrow.model.head_widths == (4, 4)
    helpers.assert_close(logits_of(narrow), whole, 2e-4)
    narrower = convert.load(source, pooling="width", head_width=3)
    assert helpers.relative_difference(logits_of(narrower), whole) > 1e-2


def test_command_line_makes_heads_narrow_and_back(source, tmp_path, capsys):
    """Directory, safetensors and back bit for bit; the released code's file cannot say it."""
    command = ["convert", "--source", str(source), "--out", str(tmp_path / "narrow")]
    heads = ["--attention", "gqa", "--num-kv-heads", "3"]
    widths = ["--pooling", "svd", "--head-width", "5", "--v-head-width", "3"]
    assert cli.main([*command, *heads, *widths]) == 0
    converted = json.loads((tmp_path / "narrow" / "model.json").read_text())["converted"]
    how = {row["parameter"]: row["how"] for row in converted["parameters"]}
    assert "merged 6 to 3 heads (svd); narrowed 8 to 5 (svd)" in how["blocks_0..1/attn/key/kernel"]
    assert "narrowed 8 to 3 (svd)" in how["blocks_0..1/attn/value/kernel"]
    capsys.readouterr()
    assert cli.main(["inspect", "--checkpoint", str(tmp_path / "narrow")]) == 0
    assert "5 of queries and keys, 3 of values" in capsys.readouterr().out
    ours = convert.load(tmp_path / "narrow")
    convert.export(tmp_path / "narrow", tmp_path / "gqa.safetensors")
    back = convert.load(tmp_path / "gqa.safetensors")
    assert back.model == ours.model
    jax.tree.map(np.testing.assert_array_equal, back.variables, ours.variables)
    with pytest.raises(UserError, match=r"cannot say .*head_width=5"):
        convert.export(tmp_path / "narrow", tmp_path / "gqa.pth", "released")
    assert not (tmp_path / "gqa.pth").exists()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"head_width": 4}, "pooling 'mean' leaves heads as wide as they are, 8.* svd and width"),
        ({"head_width": 9, "pooling": "svd"}, "--head-width 9: heads are 8 wide"),
        ({"v_head_width": 9, "pooling": "svd"}, "--v-head-width 9: heads are 8 wide"),
        (
            {"head_width": 4, "pooling": "width", "attention": "gqa"},
            "'width' keeps all 6 key/value heads, and 3 were asked for.*--num-kv-heads 6",
        ),
    ],
)
def test_bad_conversions_are_refused(source, options, says):
    with pytest.raises(UserError, match=says):
        convert.load(source, **options)


def test_groups_that_are_not_equal_are_refused(tmp_path):
    """A memory that stays with the model, for which rules would take other groups."""
    memory = {"allocation": [1, 2, 3], "key_norm": [1.0, 2.0, 3.0]}
    model_directory(tmp_path / "dgqa", "dgqa_ema", memory=memory)
    with pytest.raises(UserError, match=r"layer 0 of this dgqa_ema model serves 1 2 3 query heads"):
        convert.load(tmp_path / "dgqa", pooling="width", head_width=4)
    equal = {"allocation": [2, 2, 2], "key_norm": [1.0, 2.0, 3.0]}
    model_directory(tmp_path / "equal", "dgqa_ema", memory=equal)
    found = convert.load(tmp_path / "equal", pooling="width", head_width=4)
    kept = tree_utils.unstack_layers(found.variables["norm_stats"])["blocks_0"]["attn"]
    np.testing.assert_array_equal(kept["allocation"], [2, 2, 2])
    assert "no longer matches it" in found.report.warnings[0]


@pytest.mark.slow
def test_training_starts_from_narrow_heads_and_resumes_bit_for_bit(tmp_path):
    """Grouped and narrow: the run takes the widths over, and its model has them."""
    widths = {"head_width": 5, "v_head_width": 3}
    model_directory(tmp_path / "narrow", "kdgqa", num_kv_heads=3, **widths)

    def settings():
        changes = {"init": str(tmp_path / "narrow"), "epochs": 4 * 32 / 1437}
        return tiny_config("kdgqa", checkpoint_every=2, **changes)

    whole = train.train_and_evaluate(settings(), tmp_path / "whole")
    interrupt(settings(), tmp_path / "stopped", 3)
    resumed = train.train_and_evaluate(settings(), tmp_path / "stopped")
    assert resumed["steps"] == whole["steps"] == 4
    assert_same(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    model, variables, _ = checkpoint.load_model(tmp_path / "stopped" / "model")
    assert model.head_widths == (5, 3) and model.attention.num_kv_heads == 3
    out = tree_utils.unstack_layers(variables["params"])["blocks_0"]["attn"]["out"]["kernel"]
    assert out.shape == (N, 3, D)
