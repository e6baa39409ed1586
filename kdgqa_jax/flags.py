"""The flags of each command; what their values may be is in flag_values.py."""

import argparse

from kdgqa_jax.errors import LARGEST
from kdgqa_jax.flag_values import (
    COUNT,
    IMAGE_SIZE,
    NUMBER,
    NUMBERS,
    PATH,
    PATH_OR_NONE,
    POSITIVE,
    SCALES,
    SEED,
    SOURCE,
    _in,
    _value,
)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa demo`."""
    _add_workdir(parser)
    parser.add_argument("--dataset", default="digits", help="digits or fashion_mnist")
    _add_data_dir(parser, "where the files of fashion_mnist lie")
    parser.add_argument("--seeds", type=POSITIVE, default=1, help="how many seeds")
    parser.add_argument("--seed", type=SEED, default=42, help="the first seed")
    parser.add_argument(
        "--variants", help="with commas, VARIANT or VARIANT@RULE; none: all, and gqa@svd"
    )
    _add_jobs(parser)


def add_prepare(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa prepare`."""
    parser.add_argument("--dataset", required=True, help="NAME, tfds:NAME or folder:PATH")
    _add_data_dir(parser, "where its files are, or will be")


def _add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=PATH, required=True, help="directory of the run")


def _add_data_dir(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--data-dir", type=PATH_OR_NONE, default="", help=help)


def add_bench_steps(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa bench train` and `eval`."""
    _add_model(parser)
    parser.add_argument("--variants", default="mha,gqa,kdgqa,dgqa_ema", help="with commas")
    parser.add_argument("--num-kv-heads", type=POSITIVE, help="key/value heads; none: half")
    _add_batch_size(parser, "images per step")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    parser.add_argument("--rounds", type=COUNT, default=5, help="of steps; 0: compile only")
    parser.add_argument("--peer", choices=["torch"], help="also a ViT of PyTorch, by turns")
    parser.add_argument(
        "--profile",
        type=PATH,
        help="directory for traces of one more round, and a table of where time goes",
    )
    _add_json(parser)


def _per_chip_batch(text: str) -> int | str:
    return text if text == "auto" else _in(range(1, LARGEST + 1), text)


def _mesh(text: str) -> str:
    for axis in text.split(","):
        name, _, size = axis.partition("=")
        if name not in ("fsdp", "model"):
            raise ValueError
        _in(range(1, LARGEST + 1), size)
    return text


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa compile`."""
    parser.add_argument("--config", required=True, help="NAME[:key=value,...] or a .py file")
    parser.add_argument("--topology", required=True, help="chip and shape, such as v5e:16x16")
    parser.add_argument("--step", choices=["train", "eval"], default="train", help="of what")
    parser.add_argument(
        "--per-chip-batch",
        type=_value("a whole number, at least 1, or auto", _per_chip_batch),
        help="images a chip, or auto: the most that fit; none: by the config",
    )
    parser.add_argument(
        "--mesh",
        type=_value("sizes of axes, such as fsdp=4,model=2", _mesh),
        metavar="AXIS=N,...",
        help="fsdp=N, model=N: chips that share parameters, or heads",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="FIELD=VALUE,...",
        help="one more row; may be repeated",
    )
    parser.add_argument("--python", type=PATH, help="of an environment with libtpu; none: this")
    _add_json(parser)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa doctor`."""
    parser.add_argument("--config", help="NAME[:key=value,...] of a run that is to be possible")
    parser.add_argument("--workdir", type=PATH, help="directory or bucket whose rates to measure")
    _add_job(parser)
    _add_json(parser)


def add_bench_data(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa bench data`."""
    parser.add_argument("--dataset", default="digits", help="NAME, tfds:NAME or folder:PATH")
    _add_data_dir(parser, "where its files are")
    parser.add_argument("--image-size", type=POSITIVE, default=224, help="side in pixels")
    parser.add_argument("--images", type=POSITIVE, default=2048, help="how many images")
    _add_batch_size(parser, "images per batch")
    parser.add_argument("--workers", type=COUNT, default=2, help="processes that read")
    _add_json(parser)


def add_bench_convert(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa bench convert`."""
    _add_model(parser)
    parser.add_argument("--pooling", default="mean", help="the rule")
    parser.add_argument(
        "--calibration-images", type=COUNT, default=0, help="random images that calibrate"
    )
    _add_json(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="B/16", help="SIZE/PATCH")


def _add_batch_size(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--batch-size", type=POSITIVE, default=64, help=help)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=PATH, help="a .json file for the figures")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa study`."""
    _add_config(parser)
    parser.add_argument("--workdir", type=PATH, help="directory of the study")
    _add_jobs(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="cells and an estimate of time alone"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="NAME[:key=value,...] or a .py file")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa report`."""
    parser.add_argument(
        "--workdir", type=PATH, required=True, help="directory of a study or a training run"
    )
    parser.add_argument(
        "--baselines", help="of a study, with commas: entries to compare with; none: gqa"
    )


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=POSITIVE, default=1, help="cells at once, on own cores")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa train`."""
    _add_workdir(parser)
    _add_config(parser)
    _add_job(parser)


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--multihost", action="store_true", help="one of several processes: the same on every host"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; none: found by JAX")
    parser.add_argument("--num-processes", type=POSITIVE, help="how many; none: found by JAX")
    parser.add_argument("--process-id", type=COUNT, help="of this one; none: found by JAX")
    parser.add_argument("--join-timeout", type=POSITIVE, default=300, help="seconds, at the start")


CALIBRATION_OPTIONS: dict[str, dict] = {
    "calibration": {"type": PATH, "help": "data set or folder of images to merge by"},
    "calibration_images": {"type": POSITIVE, "default": 512, "help": "how many of them"},
    "data_dir": {
        "type": PATH_OR_NONE,
        "default": "",
        "help": "where the files of the data set are",
    },
}
"""Fields of `convert.CalibrationImages`, with the seed of `--seed`."""

SUGGESTION_OPTIONS: dict[str, dict] = {
    **CALIBRATION_OPTIONS,
    "seed": {"type": SEED, "default": 0, "help": "of the choice of images"},
}
"""What `kdgqa inspect` takes beside --suggest-kv-heads."""

ENCODER_OPTIONS: dict[str, dict] = {
    "calibration_inputs": {"type": POSITIVE, "default": 512, "help": "how many of them"},
    "seed": {"type": SEED, "default": 0, "help": "of the choice of inputs"},
}
"""What `kdgqa merge-encoder` takes beside --calibration."""

_NAMES = {"metavar": "N", "nargs": "+", "default": []}
CONVERT_OPTIONS: dict[str, dict] = {
    "attention": {"help": "variant; none: that of the source"},
    "num_kv_heads": {"type": POSITIVE, "help": "key/value heads; none: kept (of mha: half)"},
    "pooling": {"default": "mean", "help": "how, such as svd or width"},
    "head_width": {"type": POSITIVE, "help": "of queries, keys (and values); none: as it is"},
    "v_head_width": {"type": POSITIVE, "help": "of values; none: as --head-width"},
    "refit": {"action": "store_true", "default": False, "help": "output to the calibration images"},
    "seed": {"type": SEED, "default": 0, "help": "of all random choices"},
    "image_size": {"type": IMAGE_SIZE, "help": "SIDE or HEIGHTxWIDTH; none: as it is"},
    "num_classes": {"type": COUNT, "help": "of a new head; none: as it is"},
    "num_heads": {"type": POSITIVE, "help": "query heads, where the source does not say"},
    "arch": {"help": "timm's name, for weights that lie alone"},
    "channels": {"type": POSITIVE, "help": "of images; none: as it is"},
    "mean": {"type": NUMBERS, "help": "of pixels in 0..1, with commas"},
    "std": {"type": NUMBERS, "help": "of pixels in 0..1, with commas"},
    "allow_missing": {**_NAMES, "help": "names that may be missing: new"},
    "allow_left_over": {**_NAMES, "help": "names that may be unused"},
    "allow_nan": {"action": "store_true", "default": False, "help": "accept NaN and infinity"},
}
"""The options of `convert.load`."""


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa convert`."""
    parser.add_argument(
        "--source", type=SOURCE, required=True, help="file, directory or hf:org/name"
    )
    parser.add_argument(
        "--out", type=PATH, required=True, help="directory (or, with --to, file) to write"
    )
    parser.add_argument("--to", help="write a file instead: safetensors or released")
    _add_options(parser, {**CONVERT_OPTIONS, **CALIBRATION_OPTIONS})


def add_merge_encoder(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa merge-encoder`."""
    parser.add_argument(
        "--source", type=PATH, required=True, help="directory that transformers has written"
    )
    parser.add_argument("--num-kv-heads", type=POSITIVE, required=True, help="key/value heads")
    parser.add_argument("--out", type=PATH, required=True, help="directory to write")
    parser.add_argument("--pooling", default="svd", help="svd, procrustes or mean")
    parser.add_argument(
        "--calibration",
        type=PATH,
        help="to merge by: .txt (a text in each line) or .npy (token ids, or features)",
    )
    _add_options(parser, ENCODER_OPTIONS)


def _add_options(parser: argparse.ArgumentParser, options: dict[str, dict]) -> None:
    for name, settings in options.items():
        metavar = {} if "action" in settings else {"metavar": name.split("_")[-1].upper()}
        parser.add_argument(f"--{name.replace('_', '-')}", **{**metavar, **settings})


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa predict`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=PATH, help="a model directory")
    source.add_argument("--exported", type=PATH, metavar="FILE", help="what `kdgqa export` wrote")
    parser.add_argument(
        "--images",
        nargs="+",
        type=PATH,
        required=True,
        help="a .npy (float32 NHWC), or files and folders",
    )
    parser.add_argument(
        "--out",
        type=PATH,
        help=".npy (logits or features), .csv or .json (top classes); none: a table",
    )
    parser.add_argument(
        "--features",
        nargs="?",
        choices=["pooled", "tokens"],
        const="pooled",
        help="write these instead of logits; alone: pooled",
    )
    parser.add_argument("--top", type=POSITIVE, default=5, help="how many classes")
    parser.add_argument("--batch-size", type=POSITIVE, default=256, help="images per batch")


def add_export(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa export`."""
    _add_checkpoint(parser)
    parser.add_argument("--out", type=PATH, required=True, help="the .npz file, or .onnx, to write")
    parser.add_argument("--platforms", help="where it is to run, with commas: cpu,cuda,tpu")
    parser.add_argument(
        "--allocation-scope",
        choices=["example"],
        help="group heads image by image, where the model groups by batches",
    )


def add_card(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa card`."""
    _add_checkpoint(parser)
    parser.add_argument("--out", type=PATH, help="a .md file; none: README.md beside the model")
    parser.add_argument(
        "--results",
        nargs="+",
        type=PATH,
        default=[],
        help=".json files of `kdgqa evaluate --out` to report",
    )
    parser.add_argument("--license", help="of the weights: an identifier such as apache-2.0")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa evaluate`."""
    from kdgqa_jax.data.shifts import SHIFTS

    _add_checkpoint(parser)
    add_prepare(parser)
    parser.add_argument("--split", choices=["test", "train"], default="test", help="which images")
    parser.add_argument(
        "--probe", help="linear or knn: of frozen features, fitted to the train split"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of what a linear probe holds out")
    parser.add_argument("--shift", default="none", help=", ".join(SHIFTS))
    parser.add_argument(
        "--batch-size",
        type=POSITIVE,
        help="images per batch; none: 256, or a bit more for the devices",
    )
    parser.add_argument("--per-class", action="store_true", help="accuracy by class too")
    parser.add_argument("--out", type=PATH, help="a .json file for the figures")
    parser.add_argument(
        "--ignore-class-names", action="store_true", help="classes may have other names"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=PATH, required=True, help="a model directory")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa inspect`."""
    _add_checkpoint(parser)
    parser.add_argument(
        "--suggest-kv-heads",
        type=NUMBER,
        metavar="SHARE",
        help="per layer the fewest key/value heads whose merging keeps this share of the energy",
    )
    _add_options(parser, SUGGESTION_OPTIONS)


def add_analyse(parser: argparse.ArgumentParser) -> None:
    """Flags of `kdgqa analyse`."""
    _add_checkpoint(parser)
    parser.add_argument(
        "--images", type=PATH, required=True, help="data set or folder of images to look at"
    )
    parser.add_argument("--out", type=PATH, required=True, help="directory to write")
    _add_data_dir(parser, "where the files of the data set are")
    parser.add_argument("--count", type=POSITIVE, default=256, help="how many images")
    parser.add_argument(
        "--noise-scales", type=SCALES, help="of PGQA's noise, with commas; none: 0 to 4"
    )
    parser.add_argument("--batch-size", type=POSITIVE, default=32, help="images per batch")
    parser.add_argument("--seed", type=SEED, default=0, help="of images and noise")


def given(arguments: argparse.Namespace, options: dict[str, dict]) -> list[str]:
    """The flags among `options` that do not stand at their defaults."""
    return [
        f"--{name.replace('_', '-')}"
        for name, settings in options.items()
        if getattr(arguments, name) != settings.get("default")
    ]
