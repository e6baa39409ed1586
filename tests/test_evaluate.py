"""Evaluation against plain numpy, and what `kdgqa evaluate` says to whom."""

import functools
import json

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kdgqa_jax import checkpoint, cli, evaluate, predict, sharding, vit
from kdgqa_jax.data import images, sources
from kdgqa_jax.data.dataset import ArraySplit, Dataset
from kdgqa_jax.errors import UserError

NAMES = tuple(f"kind {i}" for i in range(7))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def split_of(count, side=8, channels=3, seed=0, classes=6):
    """The last of the seven classes has no images."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, side, side, channels), np.uint8)
    return ArraySplit(pixels, rng.integers(0, classes, count).astype(np.int32))


BATCH = 8  # the same everywhere: one compilation


@functools.cache
def tiny(attention="gqa", **options):
    """(arguments of `vit.create`, model, variables) of seven classes for 8x8 images."""
    arguments = {"name": "mu/4", "depth": 1, "image_size": 8, "num_classes": 7,
                 "attention": attention, **options}  # fmt: skip
    model = vit.create(**arguments)
    return arguments, model, helpers.vit_variables(model, channels=3, scale=0.4)


def logits_of(pixels):
    model, variables = tiny()[1:]
    return predict.predict_array(model, variables, normalised(pixels), BATCH).logits


def write_model(path, names=NAMES, head_bias=None, **options):
    arguments, _, variables = tiny(**options)
    if head_bias is not None:
        params = variables["params"]
        head = {**params["head"], "bias": np.full(7, head_bias, np.float32)}
        variables = {**variables, "params": {**params, "head": head}}
    description = {
        "model": arguments,
        "channels": 3,
        "class_names": list(names),
        "preprocessing": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }
    checkpoint.save_model(path, variables, description)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def data_set(monkeypatch):
    """Make a data set that goes by the name of `tiny`."""

    def make(train=None, test=None, names=NAMES, native_size=None):
        made = Dataset("tiny", names, train or split_of(3), test or split_of(10), native_size)
        row = sources.Source(lambda *_: made, 7, names, native_size, "", "", "", needs_dir=False)
        monkeypatch.setitem(sources.SOURCES, "tiny", row)
        return made

    return make


def naive(logits, labels):
    """Every figure by loops over images, bins and classes, in float64."""
    logits = logits.astype(np.float64)
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = e / e.sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")
    right = best[:, 0] == labels
    error = 0.0
    for low in range(15):
        inside = [i for i, p in enumerate(probability.max(1)) if low / 15 < p <= (low + 1) / 15]
        if inside:
            gap = np.mean(right[inside]) - np.mean(probability.max(1)[inside])
            error += len(inside) / len(labels) * abs(gap)
    return {
        "top1": 100 * right.mean(),
        "top5": 100 * np.mean([label in row[:5] for label, row in zip(labels, best, strict=True)]),
        "loss": -np.mean([np.log(p[label]) for p, label in zip(probability, labels, strict=True)]),
        "calibration_error": 100 * error,
        "count": len(labels),
        "per_class": {
            "count": [int((labels == c).sum()) for c in range(7)],
            "top1": [100 * right[labels == c].mean() if c in labels else None for c in range(7)],
        },
    }


def assert_figures(result, expected):
    expected = dict(expected)
    per_class, theirs = result["per_class"], expected.pop("per_class")
    assert per_class["count"] == theirs["count"]
    assert per_class["top1"] == pytest.approx(theirs["top1"])
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name


def normalised(pixels):
    return ((pixels / 255.0 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


# --- figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 16, 100])
def test_figures_are_those_of_plain_numpy(count):
    """A batch that is mostly padding, whole batches, and many of which the last one is padded."""
    _, model, variables = tiny()
    split = split_of(count)
    step = evaluate.make_eval_step.__wrapped__(model, MEAN, STD)  # shared with no other test
    result = evaluate.evaluate(step, variables, split, BATCH, sharding.make_mesh(), per_class=True)
    logits = logits_of(split.images)
    assert_figures(result, naive(logits, split.labels))
    assert step._cache_size() == 1
    if count == 100:  # the test sees many bins
        e = np.exp(logits - logits.max(1, keepdims=True))
        assert len(np.unique(np.ceil(15 * e.max(1) / e.sum(1)))) >= 5


def test_padding_has_no_part_in_the_groups_of_kdgqa():
    _, model, variables = tiny("kdgqa")
    split = split_of(5)
    step = evaluate.make_eval_step(model, MEAN, STD)
    result = evaluate.evaluate(step, variables, split, BATCH, sharding.make_mesh(), per_class=True)
    logits, collections = helpers.fast_jit(
        lambda images: model.apply(variables, images, mutable=["grouping"])
    )(normalised(split.images))
    assert_figures(result, naive(np.asarray(logits), split.labels))
    allocation = collections["grouping"]["blocks_0"]["attn"]["allocation"]
    assert result["allocation"] == [allocation.tolist()]
    assert len(set(result["allocation"][0])) > 1


def test_calibration_error_by_hand():
    """Ten images at 0.9 of which eight are right, ten at 0.5 of which five are: 0.5 * 0.1."""
    count, correct, confidence = np.zeros((3, 15))
    count[[13, 7]] = 10
    correct[[13, 7]] = 8, 5
    confidence[[13, 7]] = 9, 5
    assert evaluate.calibration_error(count, correct, confidence) == pytest.approx(5.0)


def test_bins_are_open_below_and_closed_above():
    values = jnp.array([0.0, 1e-6, 1 / 15, 0.07, 0.5, 1.0], jnp.float32)
    assert evaluate.confidence_bin(values).tolist() == [0, 0, 0, 1, 7, 14]


def test_nothing_is_correct_where_logits_are_nan():
    logits = jnp.array([[jnp.nan] * 3, [5.0, jnp.nan, 0.0], [5.0, 1.0, 0.0]])
    labels = jnp.array([0, 0, 0])
    assert evaluate.correct_in_top(logits, labels, 1).tolist() == [False, False, True]


def test_no_images_are_one_sentence():
    _, model, variables = tiny()
    step = evaluate.make_eval_step(model, MEAN, STD)
    with pytest.raises(UserError, match="no images to evaluate on"):
        evaluate.evaluate(step, variables, split_of(0), 4, sharding.make_mesh())


# --- model directories --------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "train"])
def test_images_are_prepared_as_the_directory_says(directory, data_set, split):
    """Larger ones are resized by its filter and normalised by channel; and shifted, if asked."""
    made = data_set(train=split_of(9, side=20, seed=3), test=split_of(6, side=20, seed=4))
    result, names = evaluate.evaluate_directory(
        directory, "tiny", split=split, shift="negative", batch_size=BATCH, per_class=True
    )
    preparation = images.Preprocessing(interpolation="bicubic")
    examples = getattr(made, split)
    pixels = [
        np.asarray(preparation.resized(Image.fromarray(255 - x), (8, 8))) for x in examples.images
    ]
    assert_figures(result, naive(logits_of(np.stack(pixels)), examples.labels))
    assert names == NAMES


def test_command_writes_what_it_shows(directory, data_set, tmp_path, capsys):
    data_set()
    out = tmp_path / "figures.json"
    arguments = command(directory)
    assert cli.main([*arguments, "--per-class", "--out", str(out)]) == 0
    written, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert (written["dataset"], written["split"], written["count"]) == ("tiny", "test", 10)
    assert written["batch_size"] == BATCH
    assert f"top-1 {written['top1']:.2f} %" in shown
    assert f"calibration error {written['calibration_error']:.2f} %" in shown
    assert [row["class"] for row in written["per_class"]] == list(NAMES)
    assert written["per_class"][6] == {"class": "kind 6", "count": 0, "top1": None}
    assert "kind 6" in shown and "layer 0: query heads per key/value head" in shown
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert "per_class" not in json.loads(out.read_text())


def test_the_default_batch_fits_the_devices(directory, data_set, monkeypatch):
    """Three devices: 258 images; a batch that was asked for is taken or refused."""
    data_set()
    monkeypatch.setattr(sharding, "batch_devices", lambda mesh: 3)
    result, _ = evaluate.evaluate_directory(directory, "tiny")
    assert result["batch_size"] == 258 and result["count"] == 10
    with pytest.raises(UserError, match="--batch-size=256 must be a positive multiple of 3"):
        evaluate.evaluate_directory(directory, "tiny", batch_size=256)


def command(directory):
    arguments = ["--checkpoint", str(directory), "--dataset", "tiny", "--batch-size", str(BATCH)]
    return ["evaluate", *arguments]


NUMBERS = tuple("0123456")


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (NUMBERS, NAMES, []),
        ((), NAMES, []),
        (NUMBERS, NUMBERS, []),
        (NAMES, NAMES[::-1], ["--ignore-class-names"]),
    ],
)
def test_models_without_names_are_compared_by_number(tmp_path, data_set, ours, theirs, arguments):
    data_set(names=theirs)
    assert cli.main([*command(write_model(tmp_path / "model", ours)), *arguments]) == 0


@pytest.mark.parametrize(
    ("data", "arguments", "says"),
    [
        ({"names": NAMES[:3]}, [], "has 7 classes, tiny has 3 classes; evaluate it on"),
        ({"names": ("sort 0", *NAMES[1:])}, [],
         "differ in 1 of 7 class names: class 0 is 'kind 0' in the model and 'sort 0' in the data"),
        ({"names": NAMES[::-1]}, [], "differ in 6 of 7 class names, in another order: class 0"),
        ({"names": NUMBERS}, [], "differ in 7 of 7 class names: class 0 is 'kind 0' in the model"),
        ({"train": split_of(3, channels=1)}, [],
         "takes RGB images (3 channels), those of tiny are grey (1); `kdgqa convert"),
        ({}, ["--out", "figures.csv"], "--out figures.csv: results are JSON"),
        ({}, ["--out", "{file}/figures.json"], "cannot be written"),
        ({}, ["--batch-size", "0"], "--batch-size: '0' must be a whole number, at least 1"),
        ({}, ["--shift", "negativ"], "unknown shift 'negativ': did you mean 'negative'"),
        ({}, ["--dataset", "tyni"], "unknown data set 'tyni': did you mean 'tiny'"),
        ({}, ["--checkpoint", "nowhere"], "is not a model directory"),
        ({}, ["--per-clas", "--topk=3"], "unknown argument '--topk=3'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(
    directory, data_set, tmp_path, capsys, data, arguments, says
):
    data_set(**data)
    (tmp_path / "file").write_text("")
    arguments = [a.replace("{file}", str(tmp_path / "file")) for a in arguments]
    assert cli.main([*command(directory), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("kdgqa evaluate: ") and error.count("\n") == 1


def test_a_model_without_a_head_is_refused(tmp_path, data_set):
    data_set()
    path = write_model(tmp_path / "model", (), num_classes=0)
    with pytest.raises(UserError, match="has no class head, tiny has 7 classes"):
        evaluate.evaluate_directory(path, "tiny")


def test_figures_that_are_not_finite_are_null(tmp_path, data_set):
    data_set()
    path, out = write_model(tmp_path / "model", head_bias=np.nan), tmp_path / "figures.json"
    assert cli.main([*command(path), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert (written["top1"], written["loss"], written["calibration_error"]) == (0.0, None, None)
