"""Images per second of each stage of the input pipeline, side by side."""

import contextlib
import io
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import ml_collections
import numpy as np

from kdgqa_jax import config as config_lib
from kdgqa_jax import memory, sharding, train
from kdgqa_jax.console import say, table
from kdgqa_jax.data import augment, pipeline, sources
from kdgqa_jax.errors import UserError

ROUNDS = 5
PIL_ALONE, READ = "PIL alone", "read and decode"
PLAIN = "read, decode and resize: plain loop"


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

    Stages: PIL alone (decoding compressed images that lie in memory), read and decode, the plain
    loop (batches as one writes them with PIL and numpy, one image after the other in one process),
    as many such loops at once as there are workers (what the cores can give), the host pipeline
    without and with workers, transfer to the device, augmentation on the device. Those of the host
    take turns, `ROUNDS` times, and the time of all turns counts, so that a machine whose speed
    drifts slows every stage alike.

    Returns:
      Per stage: stage, rate (images/s), ratio (to PIL alone for reading, to the plain loop for
      what comes after it), and for augmentation the number of compilations.
    """
    asked = {"--batch-size": config.batch_size, "--images": images, "--image-size": image_size}
    for name, value in asked.items():
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if config.data.workers < 0:
        raise UserError(f"--workers {config.data.workers} must not be negative")
    train.check(config)
    data, batch_size, mesh = config.data, config.batch_size, sharding.make_mesh()
    dataset = sources.load(data.name, data.data_dir, data.shift)
    prepared = pipeline.prepare(dataset, (image_size, image_size), data).train
    memory.check_batch("--batch-size", batch_size, (image_size, image_size, 3))
    count = min(images, len(prepared))
    steps = max(count // batch_size, 1)

    def host_pipeline(workers: int) -> float:
        batches = pipeline.TrainBatches(prepared, batch_size, config.seed, workers)
        # What lies ready ahead of time must not count: continue until it is used up.
        for _ in range(4 + 4 * max(workers, 2)):
            next(batches)
        rate = batch_size * _rate(itertools.islice(batches, steps))
        batches.close()
        time.sleep(1.0)  # threads end what they have begun
        return rate

    stages: dict[str, Callable[[], float]] = {}
    if hasattr(dataset.train, "encoded"):
        stages[PIL_ALONE] = lambda: _decoding_rate(dataset.train, count)
    stages[READ] = lambda: _rate(dataset.train[i] for i in range(count))
    loop = partial(_plain_loop_rate, prepared, batch_size)
    stages[PLAIN] = lambda: loop(steps)
    with contextlib.ExitStack() as stack:
        if data.workers > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(spawn.Pool(data.workers))

            def at_once(steps: int = steps) -> float:
                return sum(pool.map(loop, [steps] * data.workers, chunksize=1))

            at_once(1)  # processes start
            stages[f"{data.workers} plain loops at once"] = at_once
        for workers in sorted({0, data.workers}):
            stages[f"host pipeline, {workers} workers"] = partial(host_pipeline, workers)
        rounds = [{name: measure() for name, measure in stages.items()} for _ in range(ROUNDS)]
    rates = {name: statistics.harmonic_mean(r[name] for r in rounds) for name in stages}

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
    compared_with = {PIL_ALONE: PIL_ALONE, READ: PIL_ALONE if PIL_ALONE in rates else READ}
    results = [
        {"stage": name, "rate": rate, "ratio": rate / rates[compared_with.get(name, PLAIN)]}
        for name, rate in rates.items()
    ]
    results[-1]["compilations"] = step._cache_size()
    shape = "x".join(map(str, batch["image"].shape[1:]))
    title = f"{data.name}: batches of {batch_size}, {shape} from the host, to {image_size} px"
    rows = [[r["stage"], f"{r['rate']:,.0f}", f"{r['ratio']:.2f}"] for r in results]
    table(["stage", "images/s", "ratio"], rows, title, numbers=True)
    say(f"ratio: of {READ!r} to {PIL_ALONE!r}, of the others to the plain loop")
    say(f"compilations of the augmentation: {step._cache_size()}")
    return results


def _decoded(encoded: bytes) -> Any:
    """A PIL image."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _decoding_rate(split: Any, count: int) -> float:
    """Images per second that PIL decodes from memory, as a plain loop does it."""
    rates = []
    for start in range(0, count, 256):  # a few at a time, whatever the size of the split
        files = [split.encoded(i) for i in range(start, min(start + 256, count))]
        rates.append(_rate(np.asarray(_decoded(f)) for f in files))
    return statistics.harmonic_mean(rates)


def _plain_loop_rate(prepared: pipeline.Prepared, batch_size: int, steps: int) -> float:
    """Images per second of a plain loop."""
    return batch_size * _rate(_plain_loop(prepared, batch_size, steps))


def _plain_loop(prepared: pipeline.Prepared, batch_size: int, steps: int) -> Iterator[np.ndarray]:
    """Batches of images in the order of the split, with PIL and numpy alone."""
    for step in range(steps):
        rows = range(step * batch_size, (step + 1) * batch_size)
        yield np.stack([_plain_image(prepared, row % len(prepared)) for row in rows])


def _plain_image(prepared: pipeline.Prepared, index: int) -> np.ndarray:
    """An image of the plain loop; those that lie in memory come as they are prepared."""
    if not hasattr(prepared.split, "encoded"):
        return prepared[index]["image"]
    image = _decoded(prepared.split.encoded(index))
    if (image.height, image.width) != prepared.shape:
        image = prepared.preprocessing.resized(image, prepared.shape)
    return np.asarray(image)


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
