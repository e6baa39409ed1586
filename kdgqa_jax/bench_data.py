"""Images per second of each stage of the input pipeline, side by side."""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections

from kdgqa_jax import config as config_lib
from kdgqa_jax import sharding
from kdgqa_jax.console import table
from kdgqa_jax.data import augment, pipeline, sources
from kdgqa_jax.errors import UserError


def bench_config(
    dataset: str, data_dir: str, batch_size: int, workers: int
) -> ml_collections.ConfigDict:
    """The training config that `kdgqa bench data` measures."""
    config = config_lib.train_config()
    config.data.name, config.data.data_dir = dataset, data_dir
    config.data.workers = workers
    config.batch_size = batch_size
    return config


def bench_data(
    config: ml_collections.ConfigDict, image_size: int, images: int
) -> list[dict[str, Any]]:
    """Measure every stage on `images` training images and print a table.

    Stages: decode (one process, one image after the other), decode and resize (the plain loop that
    the others are compared with; measured before and after them, the faster counts), the host
    pipeline without and with workers, transfer to the device, augmentation on the device.

    Returns:
      Per stage: stage, rate (images/s), ratio (to the plain loop), and for augmentation the number
      of compilations.
    """
    asked = {"--batch-size": config.batch_size, "--images": images, "--image-size": image_size}
    for name, value in asked.items():
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if config.data.workers < 0:
        raise UserError(f"--workers {config.data.workers} must not be negative")
    data, batch_size, mesh = config.data, config.batch_size, sharding.make_mesh()
    dataset = sources.load(data.name, data.data_dir, data.shift)
    prepared = pipeline.prepare(dataset, (image_size, image_size), data).train
    count = min(images, len(prepared))
    steps = max(count // batch_size, 1)

    rates = {"decode": _rate(dataset.train[i] for i in range(count))}
    plain = _rate(prepared[i] for i in range(count))
    for workers in sorted({0, data.workers}):
        batches = pipeline.TrainBatches(prepared, batch_size, config.seed, workers)
        next(batches)  # starts workers
        # What lies ready ahead of time must not count: go on until it is used up.
        for _ in range(min(steps, 8)):
            next(batches)
        name = f"host pipeline, {workers} workers"
        rates[name] = batch_size * _rate(itertools.islice(batches, steps))
    plain = max(plain, _rate(prepared[i] for i in range(count)))
    rates = {"decode": rates.pop("decode"), "decode and resize: plain loop": plain, **rates}

    batch = next(pipeline.TrainBatches(prepared, batch_size, config.seed))
    on_device = sharding.put_batch(batch, mesh)
    rates["transfer"] = batch_size * _rate_of(lambda: sharding.put_batch(batch, mesh))
    step = jax.jit(
        lambda images, labels, seed: augment.training_batch(
            images,
            labels,
            jax.random.key(seed),
            ml_collections.FrozenConfigDict(data.augment),
            (image_size, image_size),
            len(dataset.class_names),
            data.mean,
            data.std,
        )
    )
    seeds = itertools.count()

    def augmented() -> Any:
        return step(on_device["image"], on_device["label"], next(seeds))

    rates["augment on the device"] = batch_size * _rate_of(augmented)
    results = [{"stage": s, "rate": rate, "ratio": rate / plain} for s, rate in rates.items()]
    results[-1]["compilations"] = step._cache_size()
    shape = "x".join(map(str, batch["image"].shape[1:]))
    title = f"{data.name}: batches of {batch_size}, {shape} from the host, to {image_size} px"
    rows = [[r["stage"], f"{r['rate']:,.0f}", f"{r['ratio']:.2f}"] for r in results]
    table(["stage", "images/s", "ratio to the plain loop"], rows, title, numbers=True)
    return results


def _rate(items: Iterable[Any]) -> float:
    """Items per second of an iterable."""
    started, count = time.monotonic(), 0
    for _ in items:
        count += 1
    return count / (time.monotonic() - started)


def _rate_of(call: Callable[[], Any], times: int = 8) -> float:
    """Calls per second of a function that returns arrays, after a first call that compiles."""
    jax.block_until_ready(call())
    return _rate(jax.block_until_ready(call()) for _ in range(times))
