"""The paper's protocol on a pretrained ViT-S/14: DINOv2-small, 12 layers, 6 heads, at 112 px.

    python examples/dinov2.py --out dinov2_small        # its docstring says what to install
    pip install elpv-dataset                            # and Debian's packages, as below
    kdgqa study --config dinov2:data=elpv --workdir probes_elpv --jobs 2
    kdgqa study --config dinov2:data=fashion_mnist --workdir probes_fashion_mnist --jobs 2
    kdgqa study --config dinov2:part=finetune --workdir stamps --jobs 2
    kdgqa study --config dinov2:part=finetune,target=fashion_mnist --workdir fashion_mnist --jobs 2

`probe` (default): with K = 3 and K = 2 by three rules of conversion, five seeds, linear and
nearest-neighbour probes of the frozen features, on solar cells (`elpv`) or on Fashion-MNIST
(Debian's `dataset-fashion-mnist`). Seeds draw the training images of the probes, and with them
those that calibrate. `dgqa_ema`, `dgqa_diff` and `pgqa` begin with equal groups, and noise is not
there in evaluation: after conversion they are `gqa`, and are left out.

`finetune`: all six variants, three seeds: uptrained on the solar cells, then fine-tuned on the
stamps of Tux Paint (`tuxpaint-stamps-default`), to which nothing else here was fitted, or on a part
of Fashion-MNIST. The recipe was chosen, not searched for.

The given model has no head for these classes, so reports leave top-1 before training out.

Argument string: `dinov2:part=finetune,init=DIR` (init: dinov2_small, or any model with six heads),
`data=NAME` of the probes, `target=NAME` of fine-tuning (rows of `SHARES`; digits in seconds, for
tests), `data_dir=DIR` where the four IDX files of Fashion-MNIST are.
"""

from typing import Any, NamedTuple

from kdgqa_jax.config import parse_arg, study_config
from kdgqa_jax.configs import _studies
from kdgqa_jax.errors import unknown


class Part(NamedTuple):
    """A row of `PARTS`: fields of `study_config()` that differ from its defaults."""

    variants: tuple[str, ...]
    grid: tuple[str, ...]
    seeds: int
    fields: dict[str, Any]


HEADS = "num_kv_heads=3|2"

PARTS: dict[str, Part] = {
    "probe": Part(
        ("mha", "gqa", "kdgqa"),
        (HEADS, "pooling=mean|svd|svd+refit"),
        seeds=5,
        fields={"probes": ("knn", "linear"), "uptrain.epochs": 0.0, "finetune.epochs": 0.0},
    ),
    "finetune": Part(
        ("mha", "gqa", "gqa@svd", *(f"{variant}@svd+refit" for variant in _studies.SIX[1:])),
        (HEADS,),
        seeds=3,
        fields={"uptrain.epochs": 1.0, "finetune.epochs": 3.0},
    ),
}

SHARES = {
    "elpv": (0.2, 0.5),
    "fashion_mnist": (0.006, 0.03),
    "tuxpaint_stamps": (1.0, 1.0),
    "digits": (0.1, 0.1),
}
"""By data set: shares of the training images of a probe, drawn by the seed, and of the test images,
the same for all. Training has as many images as three probes, at most all."""

RATES = {"train": 15.0, "evaluate": 45.0, "overhead": 7.0}
"""As `study_config` has them, for two CPU cores that are both busy: measured were 130 ms of CPU
time an image to train on, 43 ms an image to evaluate, and 14 s for compiling, loading and saving
(Python 3.11, jax 0.10.2)."""


def get_config(arg=""):
    """The config of one part."""
    arg = parse_arg(
        arg,
        part="probe",
        init="dinov2_small",
        data="elpv",
        target="tuxpaint_stamps",
        data_dir=_studies.FASHION_DIR,
    )
    for kind, name, known in (
        ("part", arg.part, PARTS),
        ("data set", arg.data, SHARES),
        ("data set", arg.target, SHARES),
    ):
        if name not in known:
            raise unknown(kind, name, known)
    part = PARTS[arg.part]
    names = {"pretrain": arg.data, "uptrain": arg.data, "finetune": arg.target}
    more = 3.0 if arg.part == "finetune" else 1.0
    config = study_config()
    config.variants, config.grid, config.seeds = part.variants, part.grid, part.seeds
    config.calibration_images = 128
    for section in _studies.SECTIONS:
        stage = config[section]
        stage.model.image_size = 112  # eight patches a side
        stage.model.scan_layers = True  # compiles faster
        stage.model.window = 20
        stage.batch_size, stage.eval_batch_size = 32, 64
        stage.eval_every_epochs = 0.0  # at the end only
        stage.log_every, stage.checkpoint_every = 10, 100
        stage.data.augment.rand_augment_ops = 0
        stage.data.workers = 0
        stage.optim.learning_rate = 1e-4
        stage.optim.schedule = "cosine"
        stage.optim.warmup_steps = 10
        stage.optim.weight_decay = 0.05
        stage.data.name = name = names[section]
        stage.data.data_dir = arg.data_dir if name == "fashion_mnist" else ""
        share, stage.data.test_share = SHARES[name]
        stage.data.train_share = min(more * share, 1.0)
    config.pretrain.init = arg.init
    config.pretrain.epochs = 0.0
    config.update_from_flattened_dict(part.fields)
    config.rates.update(RATES)
    return config
