"""The Vision Transformer: timm's semantics, its options, and its layouts."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DGQA, VARIANTS, images, tiny_vit, vit_variables

from kdgqa_jax import block, tree_utils, vit
from kdgqa_jax import variables as variables_lib
from kdgqa_jax.errors import UserError

CAPTURED = ["grouping", "intermediates", "norm_stats"]
EQUAL = {"mha": helpers.naive_index([1] * 6), "gqa": helpers.naive_index([2, 2, 2])}
LABELS = np.array([0, 1, 2, 3])


def loss(model, params, state, x, step, rngs):
    """Cross entropy and (logits, captured), in training."""
    logits, captured = model.apply(
        {"params": params, **state}, x, train=True, step=step, mutable=CAPTURED, rngs=rngs
    )
    return -jax.nn.log_softmax(logits)[jnp.arange(len(x)), LABELS].mean(), (logits, captured)


@functools.cache
def training_step(attention, scan_layers=False, **options):
    """(logits, captured, gradients), in the unrolled layout, of one step on fixed numbers."""
    noise_scale = 0.0 if scan_layers or attention == "pgqa" else 1.0  # streams differ by layout
    model = functools.partial(tiny_vit, attention, window=2, noise_scale=noise_scale, **options)
    variables = vit_variables(tiny_vit(attention, depth=options.get("depth", 2)))
    if scan_layers:
        variables = {name: tree_utils.stack_layers(tree) for name, tree in variables.items()}
    params, model = variables.pop("params"), model(scan_layers=scan_layers)
    function = jax.grad(functools.partial(loss, model), has_aux=True)
    grads, (logits, captured) = helpers.fast_jit(function)(
        params, variables, images(), jnp.int32(4), helpers.rngs()
    )
    captured = {name: tree_utils.unstack_layers(tree) for name, tree in captured.items()}
    return logits, captured, tree_utils.unstack_layers(grads)


@functools.cache
def evaluation(model):
    return helpers.fast_jit(functools.partial(model.apply, mutable=CAPTURED))


# --- the table of models ------------------------------------------------------------------------

TIMM_COUNTS = {"Ti/16": 5717416, "S/16": 22050664, "B/16": 86567656, "L/16": 304326632}
GQA_COUNTS = {
    ("Ti/16", 1): 5124520,
    ("S/16", 3): 20276584,
    ("B/16", 3): 75937000,
    ("L/16", 4): 266541032,
}


def count(name, **options) -> int:
    model = vit.create(name, scan_layers=True, **options)
    params = helpers.init_shapes(model, jnp.zeros((1, 224, 224, 3)))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_every_size_is_pinned():
    assert set(vit.SIZES) == {name.removesuffix("/16") for name in TIMM_COUNTS} | {"mu", "mini"}
    assert {name for name, _ in GQA_COUNTS} == set(TIMM_COUNTS)


def by_hand(name, num_kv_heads) -> int:
    d, depth, n, m = (
        vit.SIZES[name.removesuffix("/16")][k] for k in ("width", "depth", "num_heads", "mlp_width")
    )
    kv = d * num_kv_heads // n
    attention = 2 * (d + 1) * d + 2 * (d + 1) * kv
    block = attention + (d + 1) * m + (m + 1) * d + 4 * d
    return depth * block + (16 * 16 * 3 + 1) * d + d + 197 * d + 2 * d + (d + 1) * 1000


@pytest.mark.parametrize("name", [*TIMM_COUNTS, "mu/16"])
def test_parameter_count_of_mha(name):
    size = name.removesuffix("/16")
    counted = count(name)
    assert counted == by_hand(name, vit.SIZES[size]["num_heads"])
    assert counted == TIMM_COUNTS.get(name, counted)
    assert vit.create(size) == vit.create(name)


@pytest.mark.parametrize("name, num_kv_heads", [*GQA_COUNTS, ("mu/16", 2)])
def test_parameter_count_of_gqa(name, num_kv_heads):
    counted = count(name, attention="gqa", num_kv_heads=num_kv_heads)
    assert counted == by_hand(name, num_kv_heads)
    assert counted == GQA_COUNTS.get((name, num_kv_heads), counted)


# --- the function -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention, options, side, patch, channels",
    [
        ("mha", {}, 8, 4, 3),
        ("gqa", {"pool": "avg"}, (4, 8), 2, 1),
        ("gqa", {"pool": "avg", "class_token": False}, (12, 6), 6, 1),
    ],
)
def test_logits_equal_numpy(attention, options, side, patch, channels):
    model = tiny_vit(attention, image_size=side, patch_size=patch, **options)
    variables, x = vit_variables(model, channels=channels, scale=0.15), images(2, side, channels)
    params = variables["params"]
    for name in {"patch_embed", "cls_token", "pos_embed"} & set(params):  # LayerNorm's eps shows
        params[name] = jax.tree.map(lambda p: 3e-3 * p, params[name])
    logits, captured = evaluation(model)(variables, x)
    expected = helpers.naive_vit(x, params, EQUAL[attention], patch, options.get("pool", "token"))
    assert logits.dtype == jnp.float32
    helpers.assert_close(logits, expected, 1e-5)
    rows, columns = model.grid
    length = rows * columns + model.class_token
    assert captured["intermediates"]["blocks_1"]["attn"]["maps"].shape == (2, 6, length, length)


def test_features_and_a_model_without_head():
    model, x = tiny_vit(), images()
    variables = vit_variables(model)
    features = helpers.fast_jit(functools.partial(model.apply, method="features"))(variables, x)
    assert features.shape == (4, 5, 48)
    logits, _ = evaluation(model)(variables, x)
    head = variables["params"]["head"]
    helpers.assert_close(features[:, 0] @ head["kernel"] + head["bias"], logits, 1e-5)
    headless = tiny_vit(num_classes=0)
    del variables["params"]["head"]
    assert "head" not in helpers.init_shapes(headless, x)["params"]
    helpers.assert_close(evaluation(headless)(variables, x)[0], features[:, 0], 1e-5)


def test_initialisation():
    model = tiny_vit("dgqa_ema", scan_layers=True)
    variables = vit.init_variables(model, jax.random.key(0), channels=1)
    shapes = helpers.init_shapes(model, jnp.zeros((1, 8, 8, 1)))
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (variables, shapes)]
    assert described[0] == described[1]
    state = variables["norm_stats"]["blocks"]["attn"]
    assert state["allocation"].tolist() == [[2, 2, 2]] * 2
    assert not state["key_norm"].any()
    first, second = variables["params"]["blocks"]["attn"]["query"]["kernel"]
    assert np.abs(first - second).mean() > 0.5 * first.std() > 0.005
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if path[-1].key in ("bias", "scale"):
            np.testing.assert_array_equal(leaf, float(path[-1].key == "scale"))


@pytest.mark.parametrize("attention", ["mha", "gqa"])
def test_every_parameter_gets_a_gradient(attention):
    _, _, grads = training_step(attention)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("key/bias"):  # the same score added to every token: softmax drops it
            assert np.abs(grad).max() < 1e-6, name
        else:
            assert np.mean(grad != 0) > 0.9, name  # a GELU far below zero passes nothing
            assert np.abs(grad).max() > 1e-5, name


# --- layouts and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", VARIANTS)
def test_scanned_layers_equal_unrolled_ones(attention):
    plain, scanned = training_step(attention), training_step(attention, scan_layers=True)
    helpers.assert_close(scanned[0], plain[0], 1e-5)
    assert ("norm_stats" in plain[1]) == (attention in DGQA)
    helpers.assert_close(scanned[1], plain[1], 1e-4)
    helpers.assert_close(scanned[2], plain[2], 1e-4, scale=helpers.largest(plain[2]))
    grouping = tree_utils.grouping_of(plain[1])
    if attention in ("kdgqa", *DGQA):  # a memory of zeros changes no ratio
        helpers.assert_away_from_ties(attention, grouping["key_norm"], 6)
    allocations = np.array(grouping["allocation"])
    assert allocations.shape == (2, 6 if attention == "mha" else 3)
    if attention in ("kdgqa", *DGQA):
        assert np.any(allocations != 2)


def test_layers_are_scanned_where_the_platform_has_it_faster(monkeypatch):
    """With scan_layers None; parameters and collections stay unstacked."""
    x = images()
    model = tiny_vit("dgqa_ema", scan_layers=None)
    variables = vit_variables(tiny_vit("dgqa_ema"))

    def run():
        function = jax.jit(lambda v, x: vit.apply_in_evaluation(model, v, x))
        return "while" in function.lower(variables, x).as_text(), function(variables, x)

    scanned, (logits, collections) = run()
    assert scanned
    monkeypatch.setattr(variables_lib, "SCANNED", ())
    unrolled, (expected, unstacked) = run()
    assert not unrolled
    helpers.assert_close(logits, expected, 1e-5)
    helpers.assert_close(collections, unstacked, 1e-5)


def test_an_initialisation_is_the_same_in_either_layout():
    first, second = (
        vit.init_variables(tiny_vit("dgqa_ema", scan_layers=scan), jax.random.key(3), 1)
        for scan in (None, True)
    )
    for name, tree in first.items():
        helpers.assert_close(tree_utils.stack_layers(tree), second[name], 0)


def test_layers_are_stacked_in_order_and_back():
    tree = {f"blocks_{i}": {"w": np.full((2, 3), i)} for i in range(12)} | {"norm": np.ones(2)}
    stacked = tree_utils.stack_layers(tree)
    np.testing.assert_array_equal(stacked["blocks"]["w"][:, 0, 0], np.arange(12))
    assert set(stacked) == {"blocks", "norm"}
    helpers.assert_close(tree_utils.unstack_layers(stacked), tree, 0)
    assert tree_utils.stack_layers(stacked) is stacked
    assert tree_utils.unstack_layers(tree) is tree
    shapes = helpers.init_shapes(tiny_vit("dgqa_ema", scan_layers=True), images())
    expected = jax.eval_shape(
        lambda tree: {name: tree_utils.stack_layers(t) for name, t in tree.items()},
        helpers.init_shapes(tiny_vit("dgqa_ema"), images()),
    )
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, expected)


def test_remembered_gradients_are_the_same_in_both_layouts():
    _, _, grads = training_step("kdgqa")
    stats = {f"blocks_{i}": {"attn": {"key_gradient": jnp.zeros(3)}} for i in range(2)}
    learn = tiny_vit("kdgqa", importance="gradient").attention.rule.learn
    plain = tree_utils.map_attention(learn, stats, grads)
    stacked = (tree_utils.stack_layers(tree) for tree in (stats, grads))
    stacked = tree_utils.map_attention(learn, *stacked)
    helpers.assert_close(tree_utils.unstack_layers(stacked), plain, 1e-6)
    key = grads["blocks_1"]["attn"]["key"]
    squares = np.square(key["kernel"]).sum((0, 2)) + np.square(key["bias"]).sum(1)
    helpers.assert_close(plain["blocks_1"]["attn"]["key_gradient"], np.sqrt(squares), 1e-5)


@pytest.mark.parametrize("attention", VARIANTS)
def test_no_loop_is_lowered(attention):
    """Forward and backward pass.

    On CPU the default random numbers are made in loops of their own, so that noise and dropout are
    lowered with a generator that has none.
    """

    def text(impl, **options):
        model = tiny_vit(attention, depth=1, **options)
        shapes = helpers.init_shapes(model, images())
        function = jax.jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))
        arguments = shapes.pop("params"), shapes, images(), jnp.int32(0), helpers.rngs(impl=impl)
        return function.lower(*arguments).as_text()

    assert "while" not in text("unsafe_rbg", attn_dropout=0.1, dropout=0.1, drop_path=0.1)
    assert ("while" in text("threefry2x32")) == (attention == "pgqa")


# --- regularisation and precision ---------------------------------------------------------------


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    x = helpers.normal(0, 4000, 2, 3)
    y = np.asarray(helpers.fast_jit(block.drop_path)(x, 0.3, jax.random.key(0)))
    dropped = (y == 0).all((1, 2))
    assert abs(dropped.mean() - 0.3) < 0.03
    helpers.assert_close(y[~dropped], x[~dropped] / 0.7, 1e-6)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_drop_path_grows_from_none_to_its_full_rate(scan_layers):
    """A rate of almost one in the last of two layers leaves the first alone."""
    variables = vit_variables(tiny_vit())
    model = tiny_vit(drop_path=1 - 1e-6, scan_layers=scan_layers)
    first = tiny_vit(depth=1)
    layout = tree_utils.stack_layers if scan_layers else tree_utils.unstack_layers
    params = layout(variables["params"])
    run = helpers.fast_jit(functools.partial(model.apply, train=True))
    dropped = run({"params": params}, images(), rngs=helpers.rngs())
    del variables["params"]["blocks_1"]
    helpers.assert_close(dropped, evaluation(first)(variables, images())[0], 1e-5)


@pytest.mark.parametrize("option", ["dropout", "attn_dropout"])
def test_dropout_acts_in_training_only(option):
    model, variables = tiny_vit(**{option: 0.5}), vit_variables(tiny_vit())
    train = helpers.fast_jit(functools.partial(model.apply, train=True))
    draws = [train(variables, images(), rngs=helpers.rngs(seed)) for seed in (0, 0, 5)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.01
    plain = evaluation(tiny_vit())(variables, images())[0]
    np.testing.assert_array_equal(evaluation(model)(variables, images())[0], plain)


def test_bfloat16():
    model = tiny_vit("kdgqa", dtype=jnp.bfloat16)
    variables, x = vit_variables(model), images()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.float32.dtype}
    logits, captured = evaluation(model)(variables, x)
    plain, expected = evaluation(tiny_vit("kdgqa"))(variables, x)
    layer = captured["intermediates"]["blocks_0"]["attn"]
    assert (layer["maps"].dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    for name, layer in captured["grouping"].items():
        wanted = expected["grouping"][name]["attn"]["allocation"]
        np.testing.assert_array_equal(layer["attn"]["allocation"], wanted)
        assert layer["attn"]["key_norm"].dtype == jnp.float32
    helpers.assert_close(logits, plain, 3e-2)
    shapes = helpers.init_shapes(tiny_vit("dgqa_ema", param_dtype=jnp.bfloat16), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.bfloat16.dtype}
    state = shapes["norm_stats"]["blocks_0"]["attn"]
    assert (state["key_norm"].dtype, state["allocation"].dtype) == (jnp.float32, jnp.int32)


# --- use and misuse -----------------------------------------------------------------------------


def test_capturing_shows_every_layer():
    cases = [(name, "batch") for name in VARIANTS] + [("kdgqa", "example")]
    for attention, scope in cases:
        k = 6 if attention == "mha" else 3
        batch = (4,) if scope == "example" else ()
        for scan, lead in [(False, ())] + [(True, (2,))] * (attention == "kdgqa"):
            model = tiny_vit(attention, allocation_scope=scope, scan_layers=scan)
            variables = helpers.init_shapes(model, images())
            run = functools.partial(model.apply, mutable=["grouping", "intermediates"])
            _, captured = jax.eval_shape(run, variables, images())
            for blocks in ["blocks"] if scan else ["blocks_0", "blocks_1"]:
                shapes = {
                    name: leaf.shape
                    for tree in captured.values()
                    for name, leaf in tree[blocks]["attn"].items()
                }
                assert shapes == {
                    "key_norm": (*lead, *batch, k),
                    "allocation": (*lead, *batch, k),
                    "group_index": (*lead, *batch, 6),
                    "maps": (*lead, 4, 6, 5, 5),
                    "outputs": (*lead, 4, 5, 6, 8),
                    "values": (*lead, 4, 5, k, 8),
                    "image_norms": (*lead, 4, k),
                }


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("X/16", {}, "unknown model 'X/16': .*valid: mu/PATCH, mini/PATCH, Ti/PATCH"),
        ("B16", {}, "unknown model 'B16'"),
        ("mu/2", {"num_kv_head": 4}, "option 'num_kv_head': did you mean 'num_kv_heads'"),
        ("mu/2", {"kernel_init": None}, "unknown model option 'kernel_init'"),
        ("mu/2", {"attention": "kdgpa"}, "variant 'kdgpa': did you mean 'kdgqa'"),
        ("mu/2", {"attention": "gqa", "num_kv_heads": 3}, "does not divide the 8 query heads"),
        ("mu/2", {"width": 100}, "width 100 is not a multiple of the 8 query heads"),
        ("mu/2", {"pool": "mean"}, "unknown pool 'mean': .*valid: token, avg"),
        ("mu/2", {"remat": "ful"}, "unknown remat 'ful': did you mean 'full'"),
        ("mu/4", {"image_size": 30}, r"size \(30, 30\) must be positive multiples .* size 4"),
        ("mu/4", {"image_size": (8, 0)}, r"\(8, 0\) must be positive multiples"),
        ("mu/2", {"class_token": False}, 'pool "token" needs class_token=True'),
    ],
)
def test_bad_options_are_reported_in_one_sentence(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        vit.create(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mu/0", {}, "patch_size=0 must be at least 1"),
        ("mu/2", {"depth": 0}, "depth=0 must be at least 1"),
        ("mu/2", {"num_classes": -1}, "num_classes=-1 must not be negative"),
        ("mu/2", {"image_size": 8.0}, r"\(8.0, 8.0\)"),
        ("mu/2", {"width": "64"}, "width='64' must be of type int"),
        ("mu/2", {"num_kv_heads": "4"}, "num_kv_heads='4' must be of type int"),
        ("mu/2", {"scan_layers": 1}, "scan_layers=1 must be of type bool"),
        ("mu/2", {"dropout": True}, "dropout=True must be of type float"),
        ("mu/2", {"distillation": "token", "pool": "avg"}, "distillation='token' needs pool"),
        ("custom/4", {"width": 8, "depth": 1}, "needs the options num_heads, mlp_width"),
        ("mu/2", {"num_heads": 0}, "num_heads=0"),
        ("mu/2", {"image_size": (8, 8, 8)}, r"\(8, 8, 8\)"),
        ("mu/2", {"attn_dropout": 1.5}, "attn_dropout=1.5"),
        ("mu/2", {"drop_path": -0.1}, "drop_path=-0.1"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        vit.create(name, **options)


@pytest.mark.parametrize("shape", [(2, 8, 4, 1), (8, 8, 1), (2, 16, 16, 1)])
def test_images_of_another_size_are_refused(shape):
    model = tiny_vit()
    with pytest.raises(UserError, match=r"expected images \(batch, 8, 8, channels\), got shape"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("options", [{}, {"importance": "gradient"}])
def test_a_new_memory_is_that_of_an_initialisation(options, scan_layers):
    for attention in ("gqa", "kdgqa", "dgqa_ema"):
        model = helpers.tiny_vit(attention, scan_layers=scan_layers, **options)
        expected = jax.eval_shape(lambda m=model: vit.init_variables(m, jax.random.key(0), 1))
        found = vit.init_norm_stats(model)
        expected = helpers.random_variables(expected).get("norm_stats", {})
        jax.tree.map(np.testing.assert_array_equal, found, expected)
