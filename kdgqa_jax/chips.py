"""Accelerators by their data sheets."""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator: bytes of memory, dense bfloat16 FLOP/s, clock in Hz, and its names.

    `kinds` are the beginnings of what JAX calls it.
    """

    memory: int
    flops: float
    clock: float
    kinds: tuple[str, ...]


CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * GIB, 275e12, 1.05e9, ("TPU v4",)),
    "v5e": Chip(16 * GIB, 197e12, 1.5e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(95 * GIB, 459e12, 1.75e9, ("TPU v5",)),
    "v6e": Chip(32 * GIB, 918e12, 1.75e9, ("TPU v6 lite", "TPU v6e")),
    "A100": Chip(40 * GIB, 312e12, 1.41e9, ("NVIDIA A100",)),
    "H100": Chip(80 * GIB, 989e12, 1.83e9, ("NVIDIA H100",)),
    "H200": Chip(141 * GIB, 989e12, 1.83e9, ("NVIDIA H200",)),
}
"""TPUs by the first part of a topology, such as v5e:16x16; GPUs by name."""

TPUS = tuple(name for name in CHIPS if name.startswith("v"))


def find(device: jax.Device) -> Chip | None:
    """The data sheet of a device; None: it is not in the table."""
    return next((c for c in CHIPS.values() if device.device_kind.startswith(c.kinds)), None)


def memory(device: jax.Device) -> int | None:
    """Bytes of memory for programs, as the device says or its data sheet; None: not known."""
    try:
        said = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # a device that is described and not there
        said = None
    chip = find(device)
    return said or (chip.memory if chip else None)
