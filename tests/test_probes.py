"""Probes of frozen features against scikit-learn on the features of `predict`, and bad uses."""

import functools
import json

import helpers
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from kdgqa_jax import checkpoint, cli, predict, probes, vit
from kdgqa_jax.data import sources
from kdgqa_jax.data.dataset import ArraySplit, Dataset
from kdgqa_jax.errors import UserError

CLASSES = tuple(str(digit) for digit in range(10))


@functools.cache
def model():
    """(arguments, model, variables) without a class head, for digits."""
    arguments = {"name": "mu/2", "depth": 1, "image_size": 8, "num_classes": 0, "attention": "gqa"}
    made = vit.create(**arguments)
    return arguments, made, helpers.vit_variables(made, channels=1, scale=0.4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    arguments, _, variables = model()
    about = {"model": arguments, "channels": 1, "class_names": [], "preprocessing": {}}
    checkpoint.save_model(path, variables, about)
    return path


@functools.cache
def features():
    """Of `kdgqa predict --features`: ((train, labels), (test, labels))."""
    dataset = sources.load("digits")
    return [
        (predict.predict_array(*model()[1:], normalised(x.images), 512, "pooled").output, x.labels)
        for x in (dataset.train, dataset.test)
    ]


def normalised(pixels):
    return ((pixels / 255.0 - 0.5) / 0.5).astype(np.float32)


def evaluated(directory, tmp_path, *arguments):
    out = tmp_path / "figures.json"
    command = ["evaluate", "--checkpoint", str(directory), "--dataset", "digits"]
    assert cli.main([*command, "--batch-size", "512", *arguments, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_neighbours_vote_as_in_scikit_learn(directory, tmp_path, capsys):
    """Votes by hand, from the neighbours that scikit-learn finds."""
    found = evaluated(directory, tmp_path, "--probe", "knn", "--per-class")
    assert f"knn probe on digits test: top-1 {found['top1']:.2f} %" in capsys.readouterr().out
    (train, labels), (test, test_labels) = features()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    finder = KNeighborsClassifier(20, algorithm="brute").fit(unit[0], labels)
    distance, index = finder.kneighbors(unit[1])
    votes = np.zeros((len(test), 10))
    for row, (of_row, neighbours) in enumerate(zip(distance, index, strict=True)):
        for d, neighbour in zip(of_row, neighbours, strict=True):
            cosine = 1 - d**2 / 2
            votes[row, labels[neighbour]] += np.exp(cosine / 0.07)
    right = votes.argmax(axis=1) == test_labels
    assert found["top1"] == pytest.approx(100 * right.mean())
    assert found["top1"] > 40 and found["count"] == 360  # chance is 10 %
    assert found["loss"] is None and found["split"] == "test"
    assert found["probe"]["neighbours"] == 20 and found["probe"]["training_images"] == 1437
    by_class = {row["class"]: row["top1"] for row in found["per_class"]}
    assert by_class["3"] == pytest.approx(100 * right[test_labels == 3].mean())


def test_logistic_regression_is_that_of_scikit_learn(directory, tmp_path):
    found = evaluated(directory, tmp_path, "--probe", "linear", "--seed", "3")
    (train, labels), (test, test_labels) = features()
    train, test = train.astype(np.float64), test.astype(np.float64)

    def probabilities(images, of, c, on):
        mean, std = images.mean(axis=0), images.std(axis=0)
        fitted = LogisticRegression(C=c, max_iter=1000).fit((images - mean) / std, of)
        return fitted.predict_proba((on - mean) / std)

    parts = train_test_split(train, labels, test_size=0.2, stratify=labels, random_state=3)
    held = {
        c: 100 * np.mean(probabilities(parts[0], parts[2], c, parts[1]).argmax(1) == parts[3])
        for c in probes.INVERSE_REGULARISATION
    }
    chosen = max(held, key=held.get)
    assert found["probe"]["C"] == chosen
    for c, top1 in held.items():
        assert found["probe"]["held_out_top1"][str(c)] == pytest.approx(top1, abs=0.5)
    expected = probabilities(train, labels, chosen, test)
    one_image = 100 / len(test)
    top1 = 100 * np.mean(expected.argmax(1) == test_labels)
    assert found["top1"] == pytest.approx(top1, abs=one_image)
    loss = -np.mean(np.log(expected[np.arange(len(test)), test_labels]))
    assert found["loss"] == pytest.approx(loss, rel=1e-3)
    assert found["top1"] > 50  # chance is 10 %


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--probe", "knm"], "unknown probe 'knm': did you mean 'knn'"),
        (["--probe", "knn", "--split", "train"], "leave --split train out"),
        (["--probe", "knn", "--ignore-class-names"], "leave --ignore-class-names out"),
        (["--seed", "3"], "--seed belongs to --probe linear"),
        (["--probe", "knn", "--seed", "3"], "--seed belongs to --probe linear"),
        (["--probe", "knn", "--dataset", "elpv", "--data-dir", "nowhere"], "labels.csv not found"),
        (["--probe", "knn", "--checkpoint", "nowhere"], "is not a model directory"),
        (["--probe", "linear", "--batch-size", "0"], "must be a whole number, at least 1"),
        (["--probe", "linear", "--shift", "negativ"], "unknown shift 'negativ'"),
        (["--probe", "linear", "--out", "figures.csv"], "results are JSON"),
    ],
)
def test_a_bad_use_is_one_sentence(directory, capsys, arguments, says):
    command = ["evaluate", "--checkpoint", str(directory), "--dataset", "digits", *arguments]
    assert cli.main(command) in (1, 2)
    error = capsys.readouterr().err
    assert says in error and error.startswith("kdgqa evaluate: ") and error.count("\n") == 1


def test_images_of_other_channels_are_refused(directory, monkeypatch):
    split = ArraySplit(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4, dtype=np.int32))
    monkeypatch.setattr(sources, "load", lambda *_: Dataset("rgb", CLASSES, split, split))
    with pytest.raises(UserError, match=r"takes grey images \(1 channels\), those of rgb are RGB"):
        probes.probe_directory(directory, "rgb", "knn")


def made(labels, bad=False):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(labels), 3)).astype(np.float32)
    if bad:
        values[0, 0] = np.nan
    labels = np.array(labels, np.int32)
    return probes.Features(values, labels, values[:2], labels[:2], ("a", "b", "c"))


@pytest.mark.parametrize(
    ("probe", "given", "says"),
    [
        ("knn", made([0, 0, 1], bad=True), "features of the training images are not finite"),
        ("knn", made([1, 1, 1]), "training images of at least two classes"),
        ("linear", made([0] * 9 + [1]), "class 'b' has one; add images, or use --probe knn"),
        ("linear", made([0, 0, 1, 1]), "there are 4; add images"),
    ],
)
def test_features_that_do_not_do_are_one_sentence(probe, given, says):
    with pytest.raises(UserError, match=says):
        probes.run(probe, given)


def test_fewer_images_than_neighbours_all_vote():
    found = probes.run("knn", made([0, 0, 1]))
    assert found["probe"]["neighbours"] == 3
    assert found["top1"] == 100.0  # each is its own nearest one


def test_classes_without_training_images_get_nothing():
    found = probes.run("linear", made([0, 2] * 10))
    assert found["top5"] == 100.0 and found["loss"] > 0
