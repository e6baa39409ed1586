"""What a program costs, read from the compiled program: memory, collectives, estimated cycles.

Nothing is run, so the program may be for devices that are not there: abstract states and batches
are enough to compile a training step for a TPU slice.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from kdgqa_jax import evaluate, initial, sharding, state_checkpoints, train_step, vit

# --- Steps to compile ---------------------------------------------------------------------------


def abstract_train_step(
    config: ml_collections.ConfigDict,
    num_classes: int = 1000,
    channels: int = 3,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Callable[..., Any], train_step.TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """(jitted step, abstract state, abstract batch) of a config; nothing is allocated.

    Args:
      config: the fields of `config.train_config()`.
      num_classes: of the data.
      channels: of its images.
      mesh: of devices that need not be there; None: what the config makes of those that are.
    """
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    model = initial.build_model(config, num_classes)
    step = train_step.make_train_step(model, train_step.step_config(config), 1000, mesh)
    rng = jax.random.key(config.seed)
    state = jax.eval_shape(
        lambda: train_step.init_state(vit.init_variables(model, rng, channels), config, rng)
    )
    batch = _batch(config.batch_size, model, channels, mesh)
    return step, state_checkpoints.abstract(state, sharding.by_rules(state, mesh)), batch


def abstract_eval_step(
    config: ml_collections.ConfigDict,
    num_classes: int = 1000,
    channels: int = 3,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Callable[..., Any], dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """(jitted step, abstract variables, abstract batch) of evaluation; else as for training."""
    mesh = mesh or sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    model = initial.build_model(config, num_classes)
    step = evaluate.make_eval_step(model, config.data.mean, config.data.std, mesh)
    rng = jax.random.key(config.seed)
    variables = jax.eval_shape(lambda: vit.init_variables(model, rng, channels))
    batch = _batch(config.batch_size, model, channels, mesh)
    batch["mask"] = jax.ShapeDtypeStruct(
        (config.batch_size,), jnp.bool_, sharding=sharding.batch_sharded(mesh)
    )
    return step, state_checkpoints.abstract(variables, sharding.by_rules(variables, mesh)), batch


def _batch(
    size: int, model: vit.VisionTransformer, channels: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    split = sharding.batch_sharded(mesh)
    shape = (size, *model.image_shape, channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }


# --- What a compiled program says of itself -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one execution on one device.

    Attributes:
      temporary_bytes: memory for what lives only meanwhile.
      argument_bytes: memory of what goes in: the state and a batch.
      output_bytes: memory of what comes out and takes no argument's place.
      code_bytes: memory of the program.
      cycles: the compiler's estimate in cycles by part of the program (see `PARTS`), loops times
        their trips; {} where the compiler makes none, which only that for TPUs does.
      collectives: (how many, bytes of their results) by kind.
      carried: of these bytes, by kind and part of the program.
      unpriced: elements of gathers and scatters that the estimate leaves out.
      kernels: how often kernels are called, by part of the program; it leaves them out, too.
    """

    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    code_bytes: int
    cycles: dict[str, int]
    collectives: dict[str, tuple[int, int]]
    carried: dict[str, dict[str, int]]
    unpriced: int
    kernels: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """All that has to be there at once."""
        return self.temporary_bytes + self.argument_bytes + self.output_bytes + self.code_bytes


PARTS: tuple[tuple[str, str], ...] = (
    ("augmentation", r"/augmentation/"),
    ("optimizer", r"/optimizer/"),
    ("attention", r"/attn/"),
    ("mlp", r"/mlp/"),
    ("norms", r"/(norm|norm1|norm2|fc_norm)/"),
)
"""Parts of a step, by the names of its operations; the first that matches counts."""


def read(compiled: jax.stages.Compiled) -> Costs:
    """The costs of a program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    computations = _computations(text)
    cycles: collections.Counter[str] = collections.Counter()
    exchanged: dict[str, tuple[int, int]] = {}
    carried: dict[str, dict[str, int]] = {}
    unpriced, kernels, seen = 0, collections.Counter[str](), set[str]()
    for operation, times in _executed(computations):
        if priced := re.search(r'"estimated_cycles":"(\d+)"', operation.text):
            cycles[_part(operation.name)] += int(priced[1]) * times
        else:
            inside = [operation, *computations.get(operation.calls or None, [])]
            reads = [o for o in inside if o.kind in ("gather", "scatter")]
            unpriced += times * sum(math.prod(o.shapes[0][1]) for o in reads)
        if 'custom_call_target="tpu_custom_call"' in operation.text:
            kernels[_part(operation.name)] += times
        for kind, shapes, name in _collectives(operation, computations, seen):
            count, size = exchanged.get(kind, (0, 0))
            results = sum(_BYTES.get(d, 4) * math.prod(shape) for d, shape in shapes)
            exchanged[kind] = (count + times, size + times * results)
            by_part, part = carried.setdefault(kind, {}), _part(name)
            by_part[part] = by_part.get(part, 0) + times * results
    return Costs(
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        cycles=dict(cycles.most_common()),
        collectives=exchanged,
        carried=carried,
        unpriced=unpriced,
        kernels=dict(kernels),
    )


_COLLECTIVE = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of a program.

    Attributes:
      id: its name in the program, which a trace has too.
      kind: as "fusion" or "dot".
      shapes: (dtype, shape) of its results.
      text: what stands behind the equals sign.
    """

    id: str
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    text: str

    @property
    def name(self) -> str:
        """Its name in the model."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def calls(self) -> str:
        """The computation that is fused into this operation."""
        found = re.search(r"calls=%([\w.\-]+)", self.text)
        return found[1] if found else ""

    def _runs(self, computations: dict[str, list["Operation"]]) -> Iterator[tuple[str, int]]:
        """(computation, how often it is run); of a conditional the last branch, which does work."""
        if self.kind == "while":
            body = re.search(r"body=%([\w.\-]+)", self.text)
            yield body[1], self._trips(computations)
        elif self.kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", self.text)
            names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
            names += re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.text)
            yield names[-1], 1
        elif self.kind == "call":
            yield re.search(r"to_apply=%([\w.\-]+)", self.text)[1], 1

    def _trips(self, computations: dict[str, list["Operation"]]) -> int:
        """How often a loop is run: as it says, or until it reaches the number in its condition."""
        if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', self.text):
            return int(stated[1])
        condition = re.search(r"condition=%([\w.\-]+)", self.text)
        inside = computations.get(condition[1], []) if condition else []
        limits = [re.search(r"constant\((\d+)\)", o.text) for o in inside if o.kind == "constant"]
        return int(limits[0][1]) if len(limits) == 1 and limits[0] else 1


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def _collectives(
    operation: Operation, computations: dict[str, list[Operation]], seen: set[str]
) -> Iterator[tuple[str, Shapes, str]]:
    """(kind, shapes, name) of the collectives of an operation, fused ones among them.

    One that runs beside other work is fused into several operations, from its start to its end: its
    channel, which then is in `seen`, counts once. An all-reduce of which each device keeps a slice
    is a reduce-scatter.
    """
    for o in (operation, *_fused(operation, computations)):
        channel = re.search(r"channel_id=(\d+)", o.text)
        match = re.fullmatch(_COLLECTIVE, o.kind)
        if not match or (channel and channel[1] in seen):
            continue
        if channel:
            seen.add(channel[1])
        if operation.calls.startswith("all-reduce-scatter"):
            yield "reduce-scatter", operation.shapes, operation.name or o.name
        else:
            yield match[1], o.shapes, operation.name or o.name


def _computations(text: str) -> dict[str, list[Operation]]:
    """The operations of each computation of a program; that of the entry is called ""."""
    found: dict[str, list[Operation]] = {}
    operations: list[Operation] = []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            operations = found.setdefault("" if head[1] else head[2], [])
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line):
            kind = re.search(r"(?:^|[\s)}])([a-z][\w\-]*)\(", match[2])
            results = match[2][: kind.start(1)] if kind else match[2]
            shapes = tuple(
                (dtype, tuple(int(n) for n in sides.split(",") if n))
                for dtype, sides in re.findall(r"(pred|[suf]\d+|bf16)\[([\d,]*)\]", results)
            )
            operations.append(Operation(match[1], kind[1] if kind else "", shapes, match[2]))
    return found


def operations(text: str) -> Iterator[tuple[Operation, list[Operation]]]:
    """(operation, those that are fused into it) of a whole program, given as its text."""
    computations = _computations(text)
    for operation in itertools.chain.from_iterable(computations.values()):
        yield operation, _fused(operation, computations)


def _fused(operation: Operation, computations: dict[str, list[Operation]]) -> list[Operation]:
    return computations.get(operation.calls or None, []) if operation.kind == "fusion" else []


def _executed(
    computations: dict[str, list[Operation]], name: str = "", times: int = 1
) -> Iterator[tuple[Operation, int]]:
    """Every operation that is run on its own, with how often."""
    for operation in computations.get(name, []):
        yield operation, times
        for inner, trips in operation._runs(computations):
            yield from _executed(computations, inner, times * trips)


def _part(name: str) -> str:
    part = next((part for part, pattern in PARTS if re.search(pattern, f"{name}/")), "other")
    if part in ("augmentation", "optimizer", "other"):
        return part
    way = "again" if "rematted" in name else "backward" if "transpose(" in name else "forward"
    return f"{part}, {way}"
