"""One option of the method at a time: how much does it matter?

    kdgqa study --config sweep:of=window --workdir DIR --jobs 2

`SWEEPS` has what can be swept. Everything else is as in fashion_mnist.py: pretrained once per seed,
which all cells share. docs/evidence.md says which were run at full size; a test runs each in small.

Argument string: `sweep:of=NAME`, `seeds=5`, `dataset=digits` for the same in small, `data_dir=DIR`
where the four IDX files of Fashion-MNIST are.
"""

from typing import NamedTuple

from kdgqa_jax.config import parse_arg
from kdgqa_jax.configs import _studies
from kdgqa_jax.errors import unknown

DGQA = ("dgqa_ema", "dgqa_diff")
BY_KEYS = ("gqa", "kdgqa", *DGQA)


class Sweep(NamedTuple):
    """A row of `SWEEPS`: fields of `study_config()`."""

    variants: tuple[str, ...]
    grid: tuple[str, ...]


SWEEPS: dict[str, Sweep] = {
    "kv_heads": Sweep(_studies.SIX, ("num_kv_heads=4|2|1",)),
    "window": Sweep(("gqa", *DGQA), ("model.window=100|300|500",)),
    "beta": Sweep(("gqa", "dgqa_ema"), ("model.beta=0.1|0.5|0.9|0.99",)),
    "noise": Sweep(
        ("gqa", "pgqa"), ("model.noise_target=maps|output", "model.noise_scale=0.1|0.3|1.0")
    ),
    "importance": Sweep(BY_KEYS, ("model.importance=l2|variance|max_norm|gradient",)),
    "rule": Sweep(
        ("gqa", "kdgqa"), ("pooling=mean|first|random|procrustes|svd|mean+refit|svd+refit",)
    ),
    "length": Sweep(BY_KEYS, ("uptrain.epochs=0.1|0.5|2.0",)),
    "share": Sweep(BY_KEYS, ("uptrain.data.train_share=0.01|0.1|1.0",)),
    "label_noise": Sweep(BY_KEYS, ("uptrain.data.label_noise=0.0|0.2|0.4|0.8",)),
    "scope": Sweep(("gqa", "kdgqa"), ("model.allocation_scope=batch|example",)),
    "min_heads": Sweep(BY_KEYS, ("model.min_heads_per_group=0|1",)),
}
"""By what is swept. An axis concerns those variants alone that have the option: `gqa` is the one
cell to compare with."""


def get_config(arg=""):
    """The config of one sweep."""
    arg = parse_arg(
        arg, of="kv_heads", seeds=5, dataset="fashion_mnist", data_dir=_studies.FASHION_DIR
    )
    if arg.of not in SWEEPS:
        raise unknown("sweep", arg.of, SWEEPS)
    config = _studies.from_scratch(arg.dataset, arg.data_dir)
    config.variants, config.grid = SWEEPS[arg.of]
    config.num_kv_heads = None if arg.of == "kv_heads" else 4
    config.seeds = arg.seeds
    if arg.of == "window":  # long enough for the longest window to be used
        config.uptrain.epochs *= 3
    return config
