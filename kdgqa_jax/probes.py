"""Probes of frozen features: how well classes can be read off them, without training the model.

Features are those of `kdgqa predict --features`: what the class head gets. They are extracted once.

    linear  multinomial logistic regression on standardised features; its regularisation is chosen
            on a held-out part of the training split
    knn     weighted vote of the nearest neighbours by cosine, as in DINO (arXiv 2104.14294)
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kdgqa_jax import checkpoint, evaluate, extras, predict, sharding, vit
from kdgqa_jax.console import ProgressBar
from kdgqa_jax.data import augment, pipeline, sources
from kdgqa_jax.data.dataset import Dataset
from kdgqa_jax.errors import UserError, unknown

NEIGHBOURS, TEMPERATURE = 20, 0.07
INVERSE_REGULARISATION = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""C of scikit-learn that is tried, from the strongest regularisation on."""
HELD_OUT = 0.2
MOST_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class Features:
    """Features and labels of both splits.

    Attributes:
      train: (n, D) float32.
      train_labels: (n,) int32.
      test: (m, D) float32.
      test_labels: (m,) int32.
      class_names: of the labels.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]


# --- features -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _make_step(
    model: vit.VisionTransformer, statistics: tuple[Any, Any], mesh: jax.sharding.Mesh
) -> Callable[..., jax.Array]:
    """A jitted (variables, batch) -> (B, D) float32."""

    @sharding.jit_for(mesh)
    def step(variables: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        images = augment.to_model_input(batch["image"], model.image_shape, *statistics)
        method = predict.FEATURES["pooled"]
        found, _ = vit.apply_in_evaluation(model, variables, images, batch["mask"], method=method)
        return found

    return step


def features_of(
    model: vit.VisionTransformer,
    variables: dict[str, Any],
    dataset: Dataset,
    statistics: tuple[Any, Any],
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Features:
    """The features of both splits of a data set, jitted, over the mesh.

    Args:
      model: any variant.
      variables: of the model.
      dataset: as `pipeline.prepare` gives it. An image that cannot be read is left out where
        data.skip_corrupt says so.
      statistics: mean and standard deviation of pixel values in 0..1.
      batch_size: over all devices.
      mesh: the devices.

    Raises:
      UserError: an image that cannot be read.
    """
    step = _make_step(model, statistics, mesh)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    found = []
    batches = sum(-(-len(split) // batch_size) for split in (dataset.train, dataset.test))
    with ProgressBar("features", batches) as bar:
        done = 0
        for split in (dataset.train, dataset.test):
            features, labels = [], []
            for batch in pipeline.eval_batches(split, batch_size):
                output = sharding.to_host(step(variables, sharding.put_batch(batch, mesh)), mesh)
                features.append(np.asarray(output)[batch["mask"]])
                labels.append(batch["label"][batch["mask"]])
                done += 1
                bar.update(done)
            found += [np.concatenate(features), np.concatenate(labels).astype(np.int32)]
    return Features(*found, dataset.class_names)


# --- probes ---------------------------------------------------------------------------------------


def knn(features: Features, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Shares of the weighted vote of the nearest neighbours by cosine, (m, classes).

    A neighbour has the weight exp(cosine / 0.07). Of fewer than 20 training images all have a vote.
    """
    from sklearn.neighbors import KNeighborsClassifier

    count = min(NEIGHBOURS, len(features.train))
    found = KNeighborsClassifier(
        count,
        metric="cosine",
        algorithm="brute",
        # Less the best cosine, 1, which changes no share and keeps the weights small.
        weights=lambda distance: np.exp(-distance / TEMPERATURE),
    ).fit(features.train, features.train_labels)
    shares = _of_all_classes(found, features.test, len(features.class_names))
    return shares, {"neighbours": count, "temperature": TEMPERATURE}


def linear(features: Features, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Probabilities by multinomial logistic regression, (m, classes).

    The strength that classifies most images of a held-out fifth of the training split (stratified,
    drawn by the seed) is taken, the strongest of several; then all of the split is fitted.

    Raises:
      UserError: a class with a single training image.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(features.train_labels, minlength=len(features.class_names))
    # Both parts need an image of each class, and the smaller one is a fifth.
    few = [name for name, n in zip(features.class_names, counts, strict=True) if n == 1]
    if few or round(HELD_OUT * len(features.train)) < np.sum(counts > 0):
        reason = f"class {few[0]!r} has one" if few else f"there are {len(features.train)}"
        raise UserError(
            "a linear probe holds a fifth of the training images out, with some of each class:"
            f" {reason}; add images, or use --probe knn"
        )
    train, test = (x.astype(np.float64) for x in (features.train, features.test))
    parts = train_test_split(
        train,
        features.train_labels,
        test_size=HELD_OUT,
        stratify=features.train_labels,
        random_state=seed,
    )
    fitted, held_out, fitted_labels, held_out_labels = parts
    scores = [
        float(np.mean(_fit(fitted, fitted_labels, c).predict(held_out) == held_out_labels))
        for c in INVERSE_REGULARISATION
    ]
    chosen = INVERSE_REGULARISATION[int(np.argmax(scores))]
    model = _fit(train, features.train_labels, chosen)
    probabilities = _of_all_classes(model, test, len(features.class_names))
    tried = zip(INVERSE_REGULARISATION, scores, strict=True)
    about = {"C": chosen, "held_out_top1": {str(c): 100 * score for c, score in tried}}
    return probabilities, {**about, "seed": seed}


def _fit(features: np.ndarray, labels: np.ndarray, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=MOST_ITERATIONS))
    with warnings.catch_warnings():  # a weak regularisation may not converge, nor be chosen
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def _of_all_classes(model: Any, features: np.ndarray, num_classes: int) -> np.ndarray:
    """Probabilities (m, classes) float64; 0 of classes without training images."""
    found = np.zeros((len(features), num_classes))
    found[:, model.classes_] = model.predict_proba(features)
    return found


PROBES: dict[str, Callable[..., tuple[np.ndarray, dict[str, Any]]]] = {"knn": knn, "linear": linear}
"""(features, seed) -> (probabilities of the test images by class, facts about the probe)."""


def check(name: str) -> None:
    """Raise UserError for an unknown probe, or where the package that it needs is not there."""
    if name not in PROBES:
        raise unknown("probe", name, PROBES)
    extras.needs("sklearn", f"probe {name!r}")


def run(name: str, features: Features, seed: int = 0, per_class: bool = False) -> dict[str, Any]:
    """The figures of a probe on the test split.

    Args:
      name: in `PROBES`.
      features: of both splits.
      seed: of what is held out.
      per_class: accuracies by class too.

    Returns:
      top1 and top5 in percent, loss (mean cross entropy in nats; None of knn, whose votes may leave
      nothing for the right class), count, and probe: name and choices; with `per_class` what
      `evaluate.evaluate` returns.

    Raises:
      UserError: an unknown name, features that are not finite, one class, too few images.
    """
    check(name)
    for split, values in (("training", features.train), ("test", features.test)):
        if not np.isfinite(values).all():
            raise UserError(f"the features of the {split} images are not finite; mend the model")
    if len(np.unique(features.train_labels)) < 2:
        raise UserError("a probe needs training images of at least two classes")
    probabilities, about = PROBES[name](features, seed)
    labels = features.test_labels
    best = np.argsort(-probabilities, axis=-1, kind="stable")
    right = best[:, 0] == labels
    own = probabilities[np.arange(len(labels)), labels]
    loss = float(-np.mean(np.log(own))) if own.all() and name != "knn" else None
    result = {
        "top1": float(100 * np.mean(right)),
        "top5": float(100 * np.mean((best[:, :5] == labels[:, None]).any(axis=-1))),
        "loss": loss,
        "count": len(labels),
        "probe": {"name": name, **about, "training_images": len(features.train)},
    }
    if per_class:
        counts = np.bincount(labels, minlength=len(features.class_names))
        correct = np.bincount(labels[right], minlength=len(features.class_names))
        top1 = [
            100 * float(c) / int(n) if n else None for c, n in zip(correct, counts, strict=True)
        ]
        result["per_class"] = {"count": counts.tolist(), "top1": top1}
    return result


def probe_directory(
    directory: str | os.PathLike,
    data_name: str,
    probe: str,
    data_dir: str = "",
    *,
    shift: str = "none",
    batch_size: int | None = None,
    per_class: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(figures, class names) of a probe of a model directory, with a class head or without.

    Images are prepared as `evaluate.evaluate_directory` prepares them; other arguments are its too.

    Raises:
      UserError: no model or no data there, a model for other channels, or what `run` raises.
    """
    check(probe)
    mesh = sharding.make_mesh()
    batch_size = evaluate.checked_batch_size(batch_size, mesh)
    model, variables, description = checkpoint.load_model(directory)
    dataset = sources.load(data_name, data_dir, shift)
    dataset, statistics = evaluate.prepared(directory, model, description, dataset)
    found = features_of(model, variables, dataset, statistics, batch_size, mesh)
    result = run(probe, found, seed, per_class)
    return {**result, "batch_size": batch_size}, dataset.class_names
