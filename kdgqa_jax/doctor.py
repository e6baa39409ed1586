"""What a machine has, how fast its parts are, and what would hold a run back: `kdgqa doctor`."""

import dataclasses
import importlib.util
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kdgqa_jax import (
    chips,
    config,
    fitting,
    initial,
    paths,
    sharding,
    train,
    train_step,
    version,
)
from kdgqa_jax import storage as storage_lib
from kdgqa_jax.console import say, table
from kdgqa_jax.errors import UserError, one_line

MIB = 2**20
REDUCED_MIB = 16  # of the array that devices add up
STORED_MIB = 32  # of the file that is written and read
DATA_SECONDS = 4.0  # for which batches are read
UTILISATION = 0.4  # of the rate of a matrix product, which a training step reaches at best


@dataclasses.dataclass
class Findings:
    """What one check has found.

    Attributes:
      rows: (what, value) for people.
      figures: the same for programs.
      problems: a sentence for each thing that is missing, or would hold a run back.
    """

    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, figure: Any, shown: str) -> None:
        """A figure, and how it is shown."""
        self.rows.append((name.replace("_", " "), shown))
        self.figures[name] = figure


def examine(
    settings: ml_collections.ConfigDict | None = None, workdir: str | os.PathLike | None = None
) -> dict[str, Any]:
    """Check everything, print a table and what is wrong, and return it.

    Args:
      settings: of a run that is to be possible; None: only the machine is looked at.
      workdir: where it would write, a directory or on object storage; None: nowhere.

    Returns:
      "figures" by name, and "problems", sentences.
    """
    checks: list[Callable[[], Findings]] = [software, hardware, interconnect]
    if workdir is not None:
        checks.append(lambda: storage(workdir))
    if settings is not None:
        checks.append(lambda: run(settings))
    found = Findings()
    for check in checks:
        try:
            one = check()
        except UserError as error:
            one = Findings(problems=[str(error)])
        found.rows += one.rows
        found.figures |= one.figures
        found.problems += one.problems
    first = jax.process_index() == 0
    if first:
        table(("", "found"), found.rows)
    for problem in found.problems:  # of each host its own
        print(
            f"- {problem}" if first else f"- process {jax.process_index()}: {problem}", flush=True
        )
    say(f"{len(found.problems) or 'no'} problem{'s' * (len(found.problems) != 1)}")
    return {"figures": found.figures, "problems": found.problems}


# --- The machine --------------------------------------------------------------------------------


_PARTS = (
    ("/dev/nvidia0", "gpu", "an NVIDIA GPU is here", "cuda"),
    ("/dev/accel0", "tpu", "a TPU is here", "tpu"),
    ("/dev/vfio/0", "tpu", "a TPU is here", "tpu"),
)
"""(device file, platform, what it means, the extra that makes JAX use it)."""


def software() -> Findings:
    """Versions, and what JAX would need to use what is built in."""
    found = Findings()
    for name, number in version.versions().items():
        found.add(name, number, number)
    for file, platform, what, extra in _PARTS:
        if pathlib.Path(file).exists() and jax.default_backend() != platform:
            found.problems.append(
                f'{what} ({file}) and JAX does not use it: pip install "kdgqa-jax[{extra}]"'
            )
            break
    for scheme, store in paths.STORES.items():
        there = importlib.util.find_spec(store.package) is not None
        found.add(f"{scheme}://", there, "yes" if there else f"no ({store.package} is missing)")
    return found


def hardware() -> Findings:
    """Processes, devices and their memory, processors and memory of this host."""
    found, device = Findings(), jax.devices()[0]
    found.add("processes", jax.process_count(), str(jax.process_count()))
    count, here = jax.device_count(), jax.local_device_count()
    found.add("devices", count, f"{count} x {device.device_kind}, {here} of them here")
    memory = chips.memory(device)
    shown = f"{memory / chips.GIB:.1f} GiB" if memory else "not known"
    found.add("memory_of_a_device", memory, shown)
    found.add("processors", len(os.sched_getaffinity(0)), str(len(os.sched_getaffinity(0))))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.add("memory_of_this_host", host, f"{host / chips.GIB:.1f} GiB")
    flops = matrix_product_rate()
    found.add("matrix_product_flops", flops, f"{flops / 1e12:.3g} TFLOP/s of a device, bfloat16")
    if jax.default_backend() == "cpu":
        found.problems.append("JAX finds no accelerator: everything runs on the processors")
    return found


def _seconds(call: Callable[[], Any], times: int = 3) -> float:
    """The shortest time of a call that returns arrays, after a first one that compiles."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return min(taken)


def matrix_product_rate() -> float:
    """FLOP/s of a bfloat16 matrix product on one device of this process."""
    side = 512 if jax.default_backend() == "cpu" else 8192
    x = jax.device_put(jnp.ones((side, side), jnp.bfloat16), jax.local_devices()[0])
    product = jax.jit(lambda x: x @ x)
    return 2 * side**3 / _seconds(lambda: product(x))


def interconnect() -> Findings:
    """How fast all devices, of all processes, add up an array."""
    found, count = Findings(), jax.device_count()
    if count == 1:
        found.add("all_reduce_bytes_per_second", None, "one device: nothing to exchange")
        return found
    mesh = sharding.make_mesh()
    local = np.ones((jax.local_device_count(), REDUCED_MIB * MIB // 4), np.float32)
    parts = jax.make_array_from_process_local_data(sharding.batch_sharded(mesh), local)
    add = jax.jit(lambda x: x.sum(axis=0), out_shardings=sharding.replicated(mesh))
    seconds = _seconds(lambda: add(parts))
    rate = REDUCED_MIB * MIB / seconds
    shown = f"{rate / 1e9:.2f} GB/s ({REDUCED_MIB} MiB in {1000 * seconds:.1f} ms)"
    found.add("all_reduce_bytes_per_second", rate, shown)
    return found


def storage(workdir: str | os.PathLike) -> Findings:
    """Rates of writing and reading a file in a workdir, which is gone afterwards.

    Raises UserError: it cannot be written.
    """
    from kdgqa_jax import workdir as workdir_lib

    found, place = Findings(), paths.absolute(workdir, "workdir")
    made = not paths.is_remote(place) and not place.exists()
    file = place / f".kdgqa-doctor-{uuid.uuid4().hex[:8]}"
    content = np.random.default_rng(0).bytes(STORED_MIB * MIB)
    started = time.perf_counter()
    with workdir_lib.written_file(file) as temporary:
        temporary.write_bytes(content)
    written = time.perf_counter()
    same = file.read_bytes() == content
    read = time.perf_counter()
    storage_lib.remove(place) if made else file.unlink()
    for name, seconds in (("write", written - started), ("read", read - written)):
        rate = STORED_MIB * MIB / seconds
        found.add(f"{name}_bytes_per_second", rate, f"{rate / 1e6:.0f} MB/s ({place})")
    if not same:
        found.problems.append(f"{place} does not hold what was written there")
    return found


# --- A run --------------------------------------------------------------------------------------


def run(settings: ml_collections.ConfigDict) -> Findings:
    """What would hold back the run of a config on these devices."""
    from kdgqa_jax.bench.steps import CLASSES, model_flops

    found, settings = Findings(), settings.copy_and_resolve_references()
    if settings.get("init", "") is None:
        found.problems.append("config field init is not set: --config.init=DIR")
        settings.init = ""
    mesh = train.check(settings)
    model = initial.build_model(settings, CLASSES)
    largest = fitting.microbatch(model, train_step.step_config(settings), mesh)
    parts = sharding.microbatches(settings.batch_size, mesh, settings.accumulate, largest)
    found.add("parts_of_a_batch", parts, f"{parts} (batch_size {settings.batch_size})")
    state = fitting.state_bytes(model, bool(settings.ema_decay), mesh)
    images = settings.batch_size // sharding.batch_devices(mesh) // parts
    needed = state + images * fitting.bytes_per_image(model)
    found.add(
        "memory_needed",
        needed,
        f"about {needed / chips.GIB:.1f} GiB a device: {state / chips.GIB:.1f} of the state, and"
        f" {images} images at once",
    )
    memory = chips.memory(mesh.devices.flat[0])
    if memory and needed > memory:
        found.problems.append(
            f"a step needs about {needed / chips.GIB:.1f} GiB a device, and there are"
            f" {memory / chips.GIB:.1f}: --config.microbatch={fitting.AUTO}, --config.mesh.fsdp=N"
            " or --config.model.remat=names need less"
        )
    flops = model_flops(model, 1, training=True)
    most = UTILISATION * matrix_product_rate() * sharding.batch_devices(mesh) / flops
    found.add("images_per_second_of_steps", most, f"at most about {most:,.0f}")
    rate = data_rate(settings, model.image_shape) * jax.process_count()
    found.add("images_per_second_of_data", rate, f"{rate:,.0f} of all hosts")
    if rate < most:
        found.problems.append(
            f"data come at {rate:,.0f} images/s and steps could take about {most:,.0f}: raise"
            f" --config.data.workers ({settings.data.workers}; there are"
            f" {len(os.sched_getaffinity(0))} processors), or keep them on the device"
            " (--config.data.on_device=true)"
        )
    return found


def data_rate(settings: ml_collections.ConfigDict, image_shape: Sequence[int]) -> float:
    """Images per second that the input pipeline of this process gives, after its start.

    Raises UserError: no such data there.
    """
    from kdgqa_jax.data import pipeline, sources

    data = settings.data
    dataset = pipeline.prepare(
        sources.load(data.name, data.data_dir, data.shift), image_shape, data
    )
    batches = pipeline.TrainBatches(dataset.train, settings.batch_size, settings.seed, data.workers)
    try:
        next(batches)
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < DATA_SECONDS and count < 64:
            next(batches)
            count += 1
        seconds = time.perf_counter() - started
    finally:
        batches.close()
    return count * settings.batch_size / jax.process_count() / seconds


def doctor(
    name: str | None, overrides: Sequence[str], workdir: str | os.PathLike | None
) -> dict[str, Any]:
    """`examine` for a config by name, with further `--config.FIELD=VALUE`.

    Raises UserError: no such config or field.
    """
    if overrides and not name:
        raise UserError(f"{one_line(overrides[0])} needs --config NAME")
    settings = config.override(config.load_config(name), overrides) if name else None
    if settings is not None and "variants" in settings:
        raise UserError(f"{name} is the config of a study; give that of a run")
    return examine(settings, workdir)
