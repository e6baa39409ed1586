"""Time, rate and memory of training and evaluation steps, side by side."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kdgqa_jax import aot, initial, memory, paths, sharding, train, vit
from kdgqa_jax import config as config_lib
from kdgqa_jax.attention import VARIANTS, variant_name
from kdgqa_jax.bench import peer as peer_lib
from kdgqa_jax.bench import traces
from kdgqa_jax.console import say, table
from kdgqa_jax.errors import UserError
from kdgqa_jax.train_step import init_state

MIB = 2**20
CLASSES = 1000

STEPS = {"train": aot.abstract_train_step, "eval": aot.abstract_eval_step}
"""What can be measured: an update, or one batch of an evaluation."""

PEAKS: tuple[tuple[str, float], ...] = (
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
)
"""Dense bfloat16 operations per second by data sheet; the first part of a device's name counts."""


def bench_config(
    model: str, num_kv_heads: int | None, batch_size: int, dtype: str
) -> ml_collections.ConfigDict:
    """The training config that is measured: that of the paper, without RandAugment."""
    config = config_lib.train_config()
    config.model.name = model
    config.model.num_kv_heads = num_kv_heads
    config.model.dtype = dtype
    config.batch_size = batch_size
    config.data.augment.rand_augment_ops = 0
    return config


@dataclasses.dataclass
class _Run:
    """One row: what runs a step and returns its seconds, its FLOPs, and what is known of it.

    `parts` runs a step under a profiler, which writes into a directory; seconds by kind.
    """

    step: Callable[[], float]
    parts: Callable[[str], dict[str, float]]
    flops: float
    facts: dict[str, Any]
    seconds: list[float] = dataclasses.field(default_factory=list)


def bench_steps(
    what: str,
    config: ml_collections.ConfigDict,
    variants: Sequence[str],
    rounds: int,
    peer: bool = False,
    profile: str = "",
) -> list[dict[str, Any]]:
    """Compile a step per variant, run them in turns, print a table.

    In each round every variant runs once, so that what else the machine does falls on all alike; a
    first round, which warms up, does not count. Ratios are medians of those within a round.

    Args:
      what: a name in `STEPS`.
      config: from `bench_config`; key/value heads do not hold for `mha`.
      variants: names in `attention.VARIANTS`.
      rounds: how many; 0: compile only.
      peer: PyTorch's multi-head ViT of the same size takes turns, in a process of its own.
      profile: a directory for traces of one more round, which make a second table; "": none.

    Returns:
      Per row: name, temporary_bytes, argument_bytes, compile_seconds, peak_bytes (the most memory
      of the device in use so far, None where it is not known), and with rounds seconds (median of a
      step), rate (images/s), rounds (seconds of each), utilisation (model FLOPs of the peak; None
      where that is not known). With a profile parts: seconds by kind of operation (`bench.traces`).

    Raises:
      UserError: options that do not fit, or `peer` without PyTorch.
    """
    if profile and not rounds:
        raise UserError("--profile needs steps that run; leave out --profile or --rounds 0")
    if profile:
        _make_folder(profile)
    for variant in variants:  # all of them, before the first one takes its time
        of_variant = _of_variant(config, variant)
        train.check(of_variant)
        image_shape = initial.build_model(of_variant, CLASSES).image_shape
        memory.check_batch("batch_size", config.batch_size, (*image_shape, 3))
    with contextlib.ExitStack() as stack:
        runs = []
        if peer:
            model = initial.build_model(_of_variant(config, "mha"), CLASSES)
            runs.append(_peer_run(stack, what, config, model))
        runs += [_run(what, _of_variant(config, variant), bool(rounds)) for variant in variants]
        for _ in range(rounds + 1 if rounds else 0):
            for run in runs:
                run.seconds.append(run.step())
        if profile:
            for run in runs:
                run.facts["parts"] = run.parts(profile)
    results = []
    for run in runs:
        timed = {}
        if rounds:
            seconds = statistics.median(run.seconds[1:])
            peak = _peak()
            timed = {"seconds": seconds, "rate": config.batch_size / seconds}
            timed["rounds"] = run.seconds[1:]
            timed["utilisation"] = run.flops / seconds / peak if peak else None
        results.append({**run.facts, **timed})
    _print(what, results, config)
    if profile:
        _print_parts(results)
    return results


def _make_folder(path: str) -> None:
    try:
        paths.local(path, "--profile").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {path} cannot be written ({error.strerror})") from None


def model_flops(model: vit.VisionTransformer, batch: int, training: bool) -> float:
    """Floating point operations of a step's matrix products, nothing computed twice.

    Of one layer and image, with T tokens: the projections 2 T D (H + V) (N + K), maps and heads
    2 T^2 N (H + V), the MLP 4 T D M, or 6 T D M with a gate. The backward pass
    counts twice the forward pass.
    """
    heads, kv_heads = model.attention.num_heads, model.attention.num_kv_heads
    head_widths, patches = sum(model.head_widths), model.grid[0] * model.grid[1]
    mlp = (6 if model.block.gated_mlp else 4) * model.width * model.block.mlp_width
    tokens = patches + model.num_prefix_tokens
    layer = 2 * tokens * model.width * head_widths * (heads + kv_heads)
    layer += 2 * tokens**2 * heads * head_widths + tokens * mlp
    embedding = 2 * patches * 3 * model.patch_size**2 * model.width
    head = 2 * model.width * model.num_classes
    return float((model.depth * layer + embedding + head) * batch * (3 if training else 1))


def _of_variant(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.model.attention = variant
    if VARIANTS[variant_name(variant)].multi_head:
        config.model.num_kv_heads = None
    return config


def _run(what: str, config: ml_collections.ConfigDict, allocate: bool) -> _Run:
    """A compiled step of ours, with its arrays if it is to be run."""
    started = time.monotonic()
    step, *abstract = STEPS[what](config, CLASSES)
    compiled = step.lower(*abstract).compile()
    costs = aot.read(compiled)
    model = initial.build_model(config, CLASSES)
    facts = {
        "name": config.model.attention,
        "temporary_bytes": costs.temporary_bytes,
        "argument_bytes": costs.argument_bytes,
        "compile_seconds": time.monotonic() - started,
        "peak_bytes": None,
    }
    flops = model_flops(model, config.batch_size, what == "train")
    if not allocate:
        return _Run(lambda: 0.0, lambda _: {}, flops, facts)
    state, batch = _arrays(what, config, model, abstract)

    def run() -> float:
        nonlocal state
        started = time.perf_counter()
        out = jax.block_until_ready(compiled(state, batch))
        seconds = time.perf_counter() - started
        if what == "train":
            state = out[0]
        stats = jax.local_devices()[0].memory_stats() or {}
        facts["peak_bytes"] = stats.get("peak_bytes_in_use")
        return seconds

    def profiled(folder: str) -> dict[str, float]:
        place = f"{folder}/{config.model.attention}"
        with jax.profiler.trace(place):
            run()
        return traces.read(place, compiled.as_text())

    return _Run(run, profiled, flops, facts)


def _arrays(
    what: str, config: ml_collections.ConfigDict, model: vit.VisionTransformer, abstract: list[Any]
) -> tuple[Any, dict[str, jax.Array]]:
    """A state as a run begins with it, and a batch of random images."""
    rng, noise = jax.random.key(config.seed), np.random.default_rng(config.seed)

    def begin() -> Any:
        variables = vit.init_variables(model, rng)
        return init_state(variables, config, rng) if what == "train" else variables

    shardings = jax.tree.map(lambda x: x.sharding, abstract[0])
    shape = abstract[1]["image"].shape
    batch = {
        "image": noise.integers(0, 256, shape, np.uint8),
        "label": noise.integers(0, CLASSES, shape[0], np.int32),
        "mask": np.ones(shape[0], bool),
    }
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    batch = {name: batch[name] for name in abstract[1]}
    return jax.jit(begin, out_shardings=shardings)(), sharding.put_batch(batch, mesh)


def _peer_run(
    stack: contextlib.ExitStack,
    what: str,
    config: ml_collections.ConfigDict,
    model: vit.VisionTransformer,
) -> _Run:
    peer = stack.enter_context(
        peer_lib.started(
            {
                "train": what == "train",
                "width": model.width,
                "depth": model.depth,
                "num_heads": model.attention.num_heads,
                "mlp_width": model.block.mlp_width,
                "patch_size": model.patch_size,
                "image_shape": model.image_shape,
                "classes": CLASSES,
                "batch_size": config.batch_size,
                "dtype": jnp.dtype(model.dtype or "float32").name,
                "gpu": jax.default_backend() == "gpu",
                "seed": config.seed,
            }
        )
    )
    flops = model_flops(model, config.batch_size, what == "train")
    return _Run(peer.step, lambda _: peer.parts(), flops, {"name": peer.name})


def _peak() -> float | None:
    """Operations per second of all devices; None for devices that are not in `PEAKS`."""
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAKS if name in kind), None)
    return peak and peak * jax.device_count()


def _print_parts(results: list[dict[str, Any]]) -> None:
    """A row for each kind of operation, most of all first."""
    results = [r for r in results if r["parts"]]
    if not results:
        say("the traces name no operations of these programs, so there is no table of them")
        return
    kinds = sorted({kind for r in results for kind in r["parts"]})
    kinds.sort(key=lambda kind: -sum(r["parts"].get(kind, 0.0) for r in results))
    rows = [[kind, *(f"{r['parts'].get(kind, 0.0):.3f}" for r in results)] for kind in kinds]
    rows.append(["all", *(f"{sum(r['parts'].values()):.3f}" for r in results)])
    title = "seconds of one step by kind of operation, with the profiler on"
    table(["", *(r["name"] for r in results)], rows, title, numbers=True)


def _print(what: str, results: list[dict[str, Any]], config: ml_collections.ConfigDict) -> None:
    def ratio(result: dict[str, Any], to: str, key: str) -> str:
        one = next((r for r in results if r["name"] == to), None)
        if not one or key not in result:
            return ""
        pairs = zip(np.atleast_1d(result[key]), np.atleast_1d(one[key]), strict=True)
        return f"{statistics.median(ours / theirs for ours, theirs in pairs):.3f}"

    def mib(result: dict[str, Any], key: str) -> str:
        return f"{result[key] / MIB:,.0f}" if result.get(key) is not None else ""

    columns: dict[str, Callable[[dict[str, Any]], str]] = {"": lambda r: r["name"]}
    if "seconds" in results[0]:
        columns |= {
            "step s": lambda r: f"{r['seconds']:.3f}",
            "images/s": lambda r: f"{r['rate']:,.1f}",
            "to mha": lambda r: ratio(r, "mha", "rounds"),
            "to gqa": lambda r: ratio(r, "gqa", "rounds"),
        }
        if results[0]["utilisation"] is not None:
            columns["model FLOPs"] = lambda r: f"{100 * r['utilisation']:.1f} %"
    columns |= {
        "temporary MiB": lambda r: mib(r, "temporary_bytes"),
        "to gqa ": lambda r: ratio(r, "gqa", "temporary_bytes"),
        "state MiB": lambda r: mib(r, "argument_bytes"),
        "compile s": lambda r: f"{r['compile_seconds']:.0f}" if "compile_seconds" in r else "",
    }
    device = jax.devices()[0]
    title = f"{what} step: {config.model.name}, batch {config.batch_size}, {config.model.dtype},"
    title += f" {jax.device_count()} x {device.device_kind} ({device.platform})"
    rows = [[cell(result) for cell in columns.values()] for result in results]
    table(list(columns), rows, title, numbers=True)
