"""Similarity of heads: on heads whose cosines are known, and over the scales of PGQA's noise."""

import json

import helpers
import jax
import numpy as np
import pytest
from convert_helpers import model_directory
from PIL import Image

from kdgqa_jax import analysis, cli, noise
from kdgqa_jax.errors import UserError

GROUPS = np.array([0, 0, 1, 1])


def one_hot_maps(columns, tokens=4):
    """(N, T, S): head n attends to column columns[n] alone."""
    return np.stack([np.tile(np.eye(tokens)[c], (tokens, 1)) for c in columns]).astype(np.float32)


def test_identical_heads_have_similarity_one_and_orthogonal_ones_zero():
    alike = analysis.similarity(one_hot_maps([0, 0, 1, 1]), GROUPS)
    expected = np.kron(np.eye(2), np.ones((2, 2)))
    helpers.assert_close(alike.cosine, expected, 1e-6)
    assert (float(alike.within), float(alike.between)) == (1.0, 0.0)
    crossed = analysis.similarity(one_hot_maps([0, 1, 0, 1]), GROUPS)
    assert (float(crossed.within), float(crossed.between)) == (0.0, 0.5)
    maps = one_hot_maps([0, 1, 2, 3])
    assert analysis.self_similarity(maps, 3 * maps).tolist() == [1.0] * 4
    assert analysis.self_similarity(maps, maps[::-1]).tolist() == [0.0] * 4


def test_similarity_equals_a_loop_over_pairs_for_any_leading_axes():
    heads, groups = helpers.normal(0, 2, 3, 5, 4, 6), np.array([[0, 0, 1, 2, 2], [1, 0, 0, 0, 1]])
    found = analysis.similarity(heads, groups[:, None])  # layers, images
    for layer in range(2):
        for image in range(3):
            flat = heads[layer, image].reshape(5, -1).astype(np.float64)
            pairs = {True: [], False: []}
            for i in range(5):
                for j in range(5):
                    cosine = flat[i] @ flat[j] / np.sqrt((flat[i] @ flat[i]) * (flat[j] @ flat[j]))
                    helpers.assert_close(found.cosine[layer, image, i, j], cosine, 1e-5, 1.0)
                    if i != j:
                        pairs[bool(groups[layer, i] == groups[layer, j])].append(cosine)
            helpers.assert_close(found.within[layer, image], np.mean(pairs[True]), 1e-5, 1.0)
            helpers.assert_close(found.between[layer, image], np.mean(pairs[False]), 1e-5, 1.0)


def test_pairs_that_do_not_exist_are_nan_and_shapes_are_checked():
    maps = one_hot_maps([0, 1])
    assert np.isnan(analysis.similarity(maps, np.array([0, 1])).within)
    assert np.isnan(analysis.similarity(maps, np.array([0, 0])).between)
    silent = analysis.similarity(np.zeros((2, 3, 3)), np.array([0, 0]))
    assert float(silent.within) == 0.0
    with pytest.raises(ValueError, match="do not fit together"):
        analysis.similarity(maps, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="must have one shape"):
        analysis.self_similarity(maps, maps[:1])


@pytest.mark.parametrize("statistics", noise.STATISTICS)
def test_noise_takes_heads_of_a_group_apart(statistics):
    """Identical heads get noise of their own: with maps m, noise of scale s and deviation d of the
    rows, cosines are m^2 / (m^2 + s^2 d^2) between them and the root of it with themselves."""
    tokens = 64
    maps = np.asarray(jax.nn.softmax(2 * helpers.normal(1, 1, 2, tokens, tokens)))
    maps = np.repeat(maps, 2, axis=1)  # two groups of two identical heads
    values = np.ones((1, tokens, 2, 4), np.float32)
    variant = noise.Noise(noise_statistics=statistics)
    within, selves = [], []
    for scale in (0.0, 0.5, 1.0, 2.0):
        key = jax.random.key(0)
        after, _ = analysis.perturbed(key, maps, values, GROUPS, variant, scale)
        found = analysis.similarity(after, GROUPS)
        kept = maps if statistics == "std" else maps - scale * maps.mean(-1, keepdims=True)
        power = (kept**2).sum((-2, -1)).mean()
        lost = scale**2 * tokens * maps.var(-1).sum(-1).mean()
        within.append(float(found.within[0]))
        selves.append(float(analysis.self_similarity(maps, after).mean()))
        assert within[-1] == pytest.approx(power / (power + lost), abs=0.05)
        if statistics == "std":
            assert selves[-1] == pytest.approx(np.sqrt(power / (power + lost)), abs=0.03)
    assert within[0] == pytest.approx(1.0) and selves[0] == pytest.approx(1.0)
    assert np.all(np.diff(selves) < -0.05)


def test_noise_on_outputs_leaves_maps_alone():
    layer = helpers.normal(0, 2, 4, 6, 6), helpers.normal(1, 2, 6, 2, 8)
    variant = noise.Noise(noise_target="output", noise_scale=2.0)
    maps, outputs = analysis.perturbed(jax.random.key(1), *layer, GROUPS, variant)
    expected = np.einsum("BNTS,BSNH->BTNH", layer[0], layer[1][:, :, GROUPS])
    helpers.assert_close(maps, layer[0], 0.0)
    assert helpers.relative_difference(outputs, expected) > 0.1
    helpers.assert_close(outputs[..., 0], expected[..., 0], 1e-5)  # first entries are left alone
    undisturbed = analysis.perturbed(jax.random.key(1), *layer, GROUPS, variant, 0.0)[1]
    helpers.assert_close(undisturbed, expected, 1e-5)


def test_many_images_are_as_one_batch():
    """Averages over padded batches equal those over the images, one by one."""
    model = helpers.tiny_vit("kdgqa", allocation_scope="example")
    variables, images = helpers.vit_variables(model, scale=0.15), helpers.images(3)
    found = analysis.analyse(model, variables, images, [1.0], batch_size=2)
    seen = jax.jit(analysis.capture, static_argnums=0)(model, variables, images)
    heads = {"maps": seen.maps, "outputs": np.swapaxes(seen.outputs, 2, 3)}
    for kind, x in heads.items():
        alike = analysis.similarity(x, seen.group_index)
        helpers.assert_close(found.cosine[kind][0], alike.cosine.mean(1), 1e-5)
        helpers.assert_close(found.within[kind][0], np.nanmean(alike.within, axis=1), 1e-5)
        helpers.assert_close(found.self[kind][0], np.ones_like(found.self[kind][0]), 1e-5)
        assert (found.self[kind][1] < 0.99).all()
    helpers.assert_close(found.key_norms, np.swapaxes(seen.image_norms, 0, 1), 1e-5)
    assert found.noise_scales == (0.0, 1.0) and found.allocations.shape == (3, 2, 3)


def test_what_was_logged_comes_as_arrays():
    train = [{"step": i, "split": "train", "key_norm": [[1.0, None]]} for i in (5, 10)]
    records = [*train, {"step": 10, "split": "test", "key_norm": [[7.0, 7.0]]}, {"step": 11}]
    steps, norms = analysis.over_training(records, "key_norm")
    assert steps.tolist() == [5, 10] and norms.shape == (2, 1, 2)
    assert norms[0, 0, 0] == 1.0 and np.isnan(norms[0, 0, 1])
    assert [len(x) for x in analysis.over_training(records, "allocation")] == [0, 0]


def test_bad_calls_are_one_sentence():
    model = helpers.tiny_vit("gqa")
    with pytest.raises(UserError, match="no images to analyse"):
        analysis.analyse(model, {}, helpers.images(3)[:0])
    with pytest.raises(UserError, match=r"noise scales .* not negative"):
        analysis.analyse(model, {}, helpers.images(3), [-1.0])


def test_the_command_writes_figures_and_plots_twice_the_same(tmp_path, capsys):
    directory = model_directory(tmp_path / "model", "pgqa", noise_scale=2.0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    files = []
    for name in ("a", "b"):
        arguments = ["--checkpoint", str(directory), "--images", str(tmp_path / "images")]
        scales = ["--noise-scales", "0,2", "--batch-size", "2", "--out", str(tmp_path / name)]
        assert cli.main(["analyse", *arguments, *scales]) == 0
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    plots = {"similarity", "noise", "key_norm", "allocation"}
    assert files[0].keys() == {f"{p}.{kind}" for p in plots for kind in ("png", "svg")} | {
        "analysis.json"
    }
    found = json.loads(files[0]["analysis.json"])
    assert found["image_count"] == 3 and found["noise_scales"] == [0.0, 2.0]
    assert found["attention"]["noise"]["noise_scale"] == 2.0
    assert np.shape(found["similarity"]["maps"]["cosine"]) == (2, 6, 6)
    assert np.shape(found["key_norm"]["quantiles"]["0.5"]) == (2, 3)
    assert "within (maps)" in capsys.readouterr().out
    assert cli.main(["analyse", *arguments, "--out", str(tmp_path / "a")]) == 1
    assert "exists already" in capsys.readouterr().err
