"""What a step costs on a TPU slice that is not here: compiled by libtpu on any machine.

The compiler runs in a process of its own, whose Python has libtpu (`pip install "kdgqa-jax[aot]"`):
where that is installed, every `import jax` looks for a TPU. `python -m kdgqa_jax.slices JSON` is
that process.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kdgqa_jax.chips import CHIPS, GIB, TPUS
from kdgqa_jax.console import say, table
from kdgqa_jax.errors import UserError, one_line

MIB = 2**20


def compile_for_slice(
    config: str,
    overrides: Sequence[str],
    topology: str,
    *,
    step: str = "train",
    per_chip_batch: int | str | None = None,
    compare: Sequence[str] = (),
    python: str = sys.executable,
) -> list[dict[str, Any]]:
    """Compile a step for a slice, print a table, return its rows.

    Args:
      config: a name that `config.load_config` takes.
      overrides: further `--config.FIELD=VALUE`.
      topology: chip and shape, such as "v5e:16x16".
      step: a name in `bench.steps.STEPS`.
      per_chip_batch: images per chip; "auto": the largest multiple of 8 that fits; None: the batch
        size of the config.
      compare: a further row for each, "FIELD=VALUE,FIELD=VALUE" on top of `overrides`.
      python: of an environment with libtpu and this package.

    Returns:
      Per row: name, images per chip, chips, fits, and where it compiles the fields of `aot.Costs`
      with seconds (estimated, of a step but for its `kernels`), utilisation, flops and
      bytes_accessed (of a chip, by the compiler) and compile_seconds; where it does not, why.

    Raises:
      UserError: an unknown chip, no libtpu, or a config that cannot be compiled.
    """
    chip = topology.partition(":")[0]
    if chip not in TPUS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise UserError(
            f"--topology {topology}: expected a chip ({', '.join(TPUS)}) and a shape, such as"
            " v5e:16x16"
        )
    rows = []
    common = {"config": config, "topology": topology, "step": step}
    for name in ("", *compare):
        request = {**common, "overrides": [*overrides, *overrides_of(name)]}
        row = _fitted(request, per_chip_batch, python)
        rows.append({"name": name or config, **row})
    _print(rows, topology)
    return rows


def overrides_of(change: str) -> list[str]:
    """`--config.FIELD=VALUE` arguments of a row to compare, "FIELD=VALUE,FIELD=VALUE" or ""."""
    return [f"--config.{field}" for field in change.split(",") if field]


def _fitted(
    request: dict[str, Any], per_chip_batch: int | str | None, python: str
) -> dict[str, Any]:
    """The row of a request; "auto" takes several compilations."""
    if per_chip_batch != "auto":
        return _compiled({**request, "per_chip_batch": per_chip_batch}, python)
    tried: dict[int, dict[str, Any]] = {}

    def attempt(count: int) -> dict[str, Any]:
        if count not in tried:
            tried[count] = _compiled({**request, "per_chip_batch": count}, python)
        return tried[count]

    for count in (8, 16):
        if not attempt(count)["fits"]:
            return attempt(8)
    memory = [tried[count]["memory_bytes"] for count in (8, 16)]
    limit = CHIPS[request["topology"].partition(":")[0]].memory
    per_image = max(memory[1] - memory[0], 1) / 8
    count = max(16, int((limit - memory[0]) / per_image + 8) // 8 * 8)
    while not attempt(count)["fits"]:
        count -= 8
    while attempt(count + 8)["fits"]:
        count += 8
    return tried[count]


def _compiled(request: dict[str, Any], python: str) -> dict[str, Any]:
    """The answer of the process that compiles."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    say(f"compiling for {request['topology']}: {' '.join(request['overrides']) or '(as it is)'}")
    command = [python, "-m", "kdgqa_jax.slices", json.dumps(request)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise UserError(f"--python {python} cannot be run ({error.strerror})") from None
    try:
        answer = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = one_line((ended.stderr.splitlines() or ["no output"])[-1])
        raise UserError(f"the compiler ended with status {ended.returncode} ({reason})") from None
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _print(rows: list[dict[str, Any]], topology: str) -> None:
    header = ["", "images", "memory a chip", "step", "utilisation", "collectives", "compiling"]
    lines = []
    for row in rows:
        images = str(row["per_chip_batch"])
        if not row["fits"]:
            lines.append([row["name"], images, f"does not fit: {row['why']}", *4 * [""]])
            continue
        limit = CHIPS[topology.partition(":")[0]].memory
        memory = f"{row['memory_bytes'] / GIB:.2f} of {limit / GIB:.0f} GiB"
        exchanged = [_exchanged(row, kind) for kind in row["collectives"]]
        lines.append(
            [
                row["name"],
                images,
                memory,
                f"{1000 * row['seconds']:.1f} ms{_kernels(row)}",
                f"{row['utilisation']:.0%}",
                "; ".join(exchanged) or "none",
                f"{row['compile_seconds']:.0f} s",
            ]
        )
    table(header, lines, f"by the compiler's estimates, {rows[0]['chips']} chips of {topology}")


def _exchanged(row: dict[str, Any], kind: str) -> str:
    """Collectives of a kind: how many, how much, and of what parts of the step the most."""
    count, size = row["collectives"][kind]
    carried = sorted(row.get("carried", {}).get(kind, {}).items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {amount / MIB:.0f}" for part, amount in carried[:3])
    return f"{count} {kind}, {size / MIB:.0f} MiB{f' ({parts})' if parts else ''}"


def _kernels(row: dict[str, Any]) -> str:
    """What an estimate leaves out, for which the compiler has no price."""
    calls = sum(row["kernels"].values())
    return f" and {calls} kernels" if calls else ""


# --- The process that compiles -------------------------------------------------------------------


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.experimental import topologies

    from kdgqa_jax import aot, initial, sharding
    from kdgqa_jax import config as config_lib
    from kdgqa_jax.bench.steps import CLASSES, STEPS, model_flops
    from kdgqa_jax.data import augment

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"])
    except Exception as error:  # whatever libtpu, or its absence, raises
        raise UserError(
            f"the TPU compiler cannot be had for {request['topology']} ({one_line(error, 120)}):"
            ' pip install "kdgqa-jax[aot]" in an environment of its own, and --python its python'
        ) from None
    config = config_lib.override(config_lib.load_config(request["config"]), request["overrides"])
    if "variants" in config:
        raise UserError(f"{request['config']} is the config of a study; give that of a run")
    fsdp, split = config.mesh.fsdp, config.mesh.model
    chips = len(found.devices)
    if fsdp < 1 or split < 1 or chips % (fsdp * split):
        raise UserError(
            f"mesh.fsdp={fsdp} times mesh.model={split} must divide the {chips} chips of"
            f" {request['topology']}"
        )
    devices = np.array(found.devices).reshape(-1, fsdp, split)
    mesh = jax.sharding.Mesh(devices, sharding.AXES)
    if request["per_chip_batch"]:
        config.batch_size = request["per_chip_batch"] * chips // split
    config.init = config.init or ""
    config_lib.check_fields(config, config_lib.train_config())
    augment.check(config.data.augment)
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulate)
    row = {"per_chip_batch": config.batch_size * split // chips, "chips": chips}
    step, *abstract = STEPS[request["step"]](config, CLASSES, mesh=mesh)
    started = time.monotonic()
    try:
        compiled = step.lower(*abstract).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used (\S+) of (\S+) hbm", str(error))
        why = f"{used[1]} of {used[2]} are needed" if used else one_line(error, 120)
        return {**row, "fits": False, "why": why}
    row["compile_seconds"] = time.monotonic() - started
    costs, counted = aot.read(compiled), compiled.cost_analysis()
    chip = CHIPS[request["topology"].partition(":")[0]]
    seconds = sum(costs.cycles.values()) / chip.clock
    flops = model_flops(
        initial.build_model(config, CLASSES), config.batch_size, request["step"] == "train"
    )
    return {
        **row,
        **dataclasses.asdict(costs),
        "memory_bytes": costs.memory_bytes,
        "fits": True,
        "seconds": seconds,
        "utilisation": flops / (seconds * chip.flops * chips),
        "flops": counted.get("flops"),
        "bytes_accessed": counted.get("bytes accessed"),
    }


def _main() -> None:
    try:
        answer = _answer(json.loads(sys.argv[1]))
    except UserError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"it cannot be compiled ({type(error).__name__}: {one_line(error)})"}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
