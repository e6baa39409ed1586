"""The command line: `kdgqa COMMAND`. Flags only; the work is done by the modules."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kdgqa_jax import memory
from kdgqa_jax.errors import SEEDS, Preempted, UserError, one_line, unknown
from kdgqa_jax.version import __version__


def _demo(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, study

    settings = config.load_config(f"demo:dataset={arguments.dataset}")
    for stage in (settings.pretrain, settings.uptrain, settings.finetune):
        stage.data.data_dir = arguments.data_dir
    settings.seeds, settings.seed = arguments.seeds, arguments.seed
    if arguments.variants:
        settings.variants = tuple(arguments.variants.split(","))
    study.run_study(config.override(settings, arguments.overrides), arguments.workdir)


def _study(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, study

    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    study.run_study(settings, arguments.workdir)


def _train(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, train
    from kdgqa_jax.console import say

    _join(arguments)
    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    result = train.train_and_evaluate(settings, arguments.workdir)
    if arguments.multihost:
        from kdgqa_jax import processes

        processes.part()
    say(
        f"test top-1 {result['top1']:.2f} % (best {result['best_top1']:.2f} %), top-5"
        f" {result['top5']:.2f} %, loss {result['loss']:.4f}; model in {arguments.workdir}/model"
    )


def _join(arguments: argparse.Namespace) -> None:
    """Become one of several processes, if that is asked for."""
    from kdgqa_jax import console, processes

    job = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.multihost:
        if processes.join_processes(*job) > 0:
            console.be_silent()  # the first process speaks for all
    elif any(x is not None for x in job):
        raise UserError("--coordinator, --num-processes and --process-id need --multihost")


def _prepare(arguments: argparse.Namespace) -> None:
    from kdgqa_jax.console import say
    from kdgqa_jax.data import sources

    dataset = sources.prepare(arguments.dataset, arguments.data_dir)
    say(
        f"{arguments.dataset}: {len(dataset.train):,} images to train on, {len(dataset.test):,} to"
        f" test on, {len(dataset.class_names)} classes"
    )


def _bench(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import bench, bench_data, config

    if arguments.what == "convert":
        bench.bench_convert(arguments.model, arguments.pooling, arguments.calibration_images)
        return
    if arguments.what == "data":
        settings = bench_data.bench_config(
            arguments.dataset, arguments.data_dir, arguments.batch_size, arguments.workers
        )
        settings = config.override(settings, arguments.overrides)
        bench_data.bench_data(settings, arguments.image_size, arguments.images)
        return
    settings = bench.bench_config(
        arguments.model, arguments.num_kv_heads, arguments.batch_size, arguments.dtype
    )
    settings = config.override(settings, arguments.overrides)
    bench.bench_train(settings, arguments.variants.split(","), arguments.steps)


def _convert(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import convert, workdir
    from kdgqa_jax.console import say, table

    workdir.check_new(arguments.out)
    given = _given(arguments, {**_CONVERT_OPTIONS, **_CALIBRATION_OPTIONS})
    if arguments.to and given:
        raise UserError(
            f"--to writes a model directory as it is; {', '.join(given)} belong to a conversion"
            " without --to"
        )
    if arguments.to:
        convert.export(arguments.source, arguments.out, arguments.to)
        say(f"written: {arguments.out}")
        return
    options = {name: getattr(arguments, name) for name in _CONVERT_OPTIONS}
    options["calibration"] = _calibration(arguments)
    converted = convert.load(arguments.source, **options)
    report = converted.report
    table(report.HEADER, report.rows())
    for note in report.notes:
        say(note)
    for warning in report.warnings:
        print(f"kdgqa convert: warning: {warning}", file=sys.stderr)
    converted.save(arguments.out)
    say(f"model directory: {arguments.out}")


def _given(arguments: argparse.Namespace, options: dict[str, dict]) -> list[str]:
    """The flags that do not stand at their defaults."""
    return [
        f"--{name.replace('_', '-')}"
        for name, settings in options.items()
        if getattr(arguments, name) != settings.get("default")
    ]


def _calibration(arguments: argparse.Namespace) -> Any:
    """Where calibration images come from; None without --calibration."""
    from kdgqa_jax.convert import CalibrationImages

    if not arguments.calibration:
        given = _given(arguments, _CALIBRATION_OPTIONS)
        if given:
            raise UserError(f"{', '.join(given)} need --calibration (a data set or a folder)")
        return None
    place = (arguments.calibration, arguments.data_dir, arguments.calibration_images)
    return CalibrationImages(*place, seed=arguments.seed)


def _predict(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import predict
    from kdgqa_jax.console import say, table

    if arguments.out:
        predict.check_output(arguments.out)
    names, predictions, classes = predict.predict_files(
        arguments.checkpoint, arguments.images, arguments.batch_size
    )
    if arguments.out:
        predict.write(arguments.out, names, predictions, classes, arguments.top)
        say(f"{len(names)} images, written: {arguments.out}")
    else:
        top = predict.top_classes(predictions.logits, classes, arguments.top)
        rows = [
            [name, ", ".join(f"{label} {100 * p:.1f} %" for label, p in best)]
            for name, best in zip(names, top, strict=True)
        ]
        table(("image", f"top {arguments.top}"), rows)
    for line in predict.describe_allocation(predictions.allocation):
        say(line)


def _evaluate(arguments: argparse.Namespace) -> None:
    import pathlib

    from kdgqa_jax import evaluate, logs, predict, workdir
    from kdgqa_jax.console import say, table

    if arguments.out and not arguments.out.endswith(".json"):
        raise UserError(f"--out {arguments.out}: results are JSON; give a name that ends in .json")
    result, class_names = evaluate.evaluate_directory(
        arguments.checkpoint,
        arguments.dataset,
        arguments.data_dir,
        split=arguments.split,
        shift=arguments.shift,
        batch_size=arguments.batch_size,
        per_class=arguments.per_class,
        compare_names=not arguments.ignore_class_names,
    )
    by_class = result.pop("per_class", None)
    say(
        f"{arguments.dataset} {arguments.split}: top-1 {result['top1']:.2f} %, top-5"
        f" {result['top5']:.2f} %, loss {result['loss']:.4f}, expected calibration error"
        f" {result['calibration_error']:.2f} %, {result['count']:,} images"
    )
    if by_class:
        rows = list(zip(class_names, by_class["count"], by_class["top1"], strict=True))
        result["per_class"] = [{"class": n, "count": c, "top1": top1} for n, c, top1 in rows]
        shown = [[n, f"{c:,}", "" if top1 is None else f"{top1:.2f}"] for n, c, top1 in rows]
        table(("class", "images", "top-1 %"), shown, numbers=True)
    for line in predict.describe_allocation([result["allocation"]]):
        say(line)
    if arguments.out:
        about = ("checkpoint", "dataset", "split", "shift", "batch_size")
        about = {name: getattr(arguments, name) for name in about}
        workdir.write_json(pathlib.Path(arguments.out), logs.valid_json({**about, **result}))
        say(f"written: {arguments.out}")


def _inspect(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import analysis, convert
    from kdgqa_jax.console import say, table

    share = arguments.suggest_kv_heads
    if share is None:
        if arguments.calibration:
            raise UserError("--calibration belongs to --suggest-kv-heads SHARE")
        facts, rows = analysis.summarise(arguments.checkpoint)
        table(("", arguments.checkpoint), facts)
        table(analysis.LAYER_HEADER, rows)
        return
    rows, by = convert.suggest_kv_heads(arguments.checkpoint, share, _calibration(arguments))
    table(convert.SUGGESTION_HEADER, rows, numbers=True)
    say(by)


_OVERRIDES = "any other field of the config: --config.FIELD=VALUE"


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    parser.add_argument("--dataset", default="digits", help="digits or fashion_mnist")
    parser.add_argument("--data-dir", default="", help="where the files of fashion_mnist lie")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--seed", type=int, default=42, help="the first seed")
    parser.add_argument(
        "--variants", help="with commas, VARIANT or VARIANT@RULE; none: all, and gqa@svd"
    )


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="NAME, tfds:NAME or folder:PATH")
    parser.add_argument("--data-dir", default="", help="where its files are, or will be")


def _add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="directory of the run")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["train", "convert", "data"], help="what is measured")
    parser.add_argument("--model", default="B/16", help="SIZE/PATCH")
    parser.add_argument("--variants", default="gqa,kdgqa,dgqa_ema", help="the first one is the 1")
    parser.add_argument("--num-kv-heads", type=int, help="key/value heads; none: half")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    parser.add_argument("--steps", type=int, default=5, help="steps timed; 0: compile only")
    parser.add_argument("--pooling", default="mean", help="convert: the rule")
    parser.add_argument(
        "--calibration-images", type=int, default=0, help="convert: random images that calibrate"
    )
    parser.add_argument("--dataset", default="digits", help="data: a data set")
    parser.add_argument("--data-dir", default="", help="data: where its files are")
    parser.add_argument("--image-size", type=int, default=224, help="data: side in pixels")
    parser.add_argument("--images", type=int, default=2048, help="data: how many images")
    parser.add_argument("--workers", type=int, default=2, help="data: processes that read")


def _add_config(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    parser.add_argument("--config", required=True, help="NAME[:key=value,...] or a .py file")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--multihost", action="store_true", help="one of several processes: the same on every host"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; none: found by JAX")
    parser.add_argument("--num-processes", type=int, help="how many; none: found by JAX")
    parser.add_argument("--process-id", type=int, help="of this one; none: found by JAX")


def _image_size(text: str) -> int | tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _seed(text: str) -> int:
    if int(text) not in SEEDS:
        raise ValueError
    return int(text)


def _floats(text: str) -> list[float]:
    return [float(x) for x in text.split(",")]


_image_size.__name__, _floats.__name__ = "SIDE or HEIGHTxWIDTH", "numbers with commas"
_seed.__name__ = "seed (0 to 2**32 - 1)"

_CALIBRATION_OPTIONS: dict[str, dict] = {
    "calibration": {"help": "data set or folder of images to merge by"},
    "calibration_images": {"type": int, "default": 512, "help": "how many of them"},
    "data_dir": {"default": "", "help": "where the files of the data set are"},
}
"""Fields of `convert.CalibrationImages`, with the seed of `--seed`."""

_NAMES = {"metavar": "NAME", "nargs": "+", "default": []}
_CONVERT_OPTIONS: dict[str, dict] = {
    "attention": {"help": "variant; none: that of the source"},
    "num_kv_heads": {"type": int, "help": "key/value heads; none: half the query heads"},
    "pooling": {"default": "mean", "help": "mean, first, random, procrustes or svd"},
    "refit": {"action": "store_true", "default": False, "help": "output to the calibration images"},
    "seed": {"type": _seed, "default": 0, "help": "of all random choices"},
    "image_size": {"type": _image_size, "help": "SIDE or HEIGHTxWIDTH; none: as it is"},
    "num_classes": {"type": int, "help": "of a new head; none: as it is"},
    "num_heads": {"type": int, "help": "query heads, where the source does not tell"},
    "channels": {"type": int, "help": "of images; none: as it is"},
    "mean": {"type": _floats, "help": "of pixels in 0..1, with commas"},
    "std": {"type": _floats, "help": "of pixels in 0..1, with commas"},
    "allow_missing": {**_NAMES, "help": "may be missing: starts anew"},
    "allow_left_over": {**_NAMES, "help": "may be in the source, unused"},
    "allow_nan": {"action": "store_true", "default": False, "help": "accept NaN and infinity"},
}
"""The options of `convert.load`."""


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="file, directory or hf:org/name")
    parser.add_argument("--out", required=True, help="directory (or, with --to, file) to write")
    parser.add_argument("--to", help="write a file instead: safetensors or released")
    _add_options(parser, {**_CONVERT_OPTIONS, **_CALIBRATION_OPTIONS})


def _add_options(parser: argparse.ArgumentParser, options: dict[str, dict]) -> None:
    for name, settings in options.items():
        metavar = {} if "action" in settings else {"metavar": name.split("_")[-1].upper()}
        parser.add_argument(f"--{name.replace('_', '-')}", **{**metavar, **settings})


def _add_predict(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, help="a .npy (float32 NHWC), or files and folders"
    )
    parser.add_argument("--out", help=".npy (logits), .csv or .json (top classes); none: a table")
    parser.add_argument("--top", type=int, default=5, help="how many classes")
    parser.add_argument("--batch-size", type=int, default=256, help="images per batch")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from kdgqa_jax.data.sources import SHIFTS

    _add_checkpoint(parser)
    _add_prepare(parser)
    parser.add_argument("--split", choices=["test", "train"], default="test", help="which images")
    parser.add_argument("--shift", default="none", help=", ".join(SHIFTS))
    parser.add_argument("--batch-size", type=int, default=256, help="images per batch")
    parser.add_argument("--per-class", action="store_true", help="accuracy by class too")
    parser.add_argument("--out", help="a .json file for the figures")
    parser.add_argument(
        "--ignore-class-names", action="store_true", help="classes may have other names"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a model directory")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument(
        "--suggest-kv-heads",
        type=float,
        metavar="SHARE",
        help="per layer the fewest key/value heads whose merging keeps this share of the energy",
    )
    _add_options(parser, _CALIBRATION_OPTIONS)
    parser.add_argument("--seed", type=_seed, default=0, help="of the choice of images")


COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "demo": ("the whole protocol on small real images, minutes on a laptop", _add_demo, _demo),
    "study": ("the protocol of a config: variants x seeds, a table, plots", _add_config, _study),
    "train": ("one training run of a config", _add_train, _train),
    "prepare": ("download a data set, or tell how to get it; count it", _add_prepare, _prepare),
    "convert": ("a checkpoint to a grouped variant, or back to PyTorch", _add_convert, _convert),
    "evaluate": ("accuracy and calibration on a data set", _add_evaluate, _evaluate),
    "predict": ("logits or top classes of images", _add_predict, _predict),
    "inspect": ("what a model directory holds", _add_inspect, _inspect),
    "bench": ("what training steps and conversions cost on this machine", _add_bench, _bench),
}
"""Command: (what it does, adds its flags, runs it)."""

_WITHOUT_CONFIG = ("prepare", "convert", "evaluate", "predict", "inspect")


class _Help(argparse.HelpFormatter):
    """Help on one screen: wide flags beside their texts, defaults where there are any."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, "", [], argparse.SUPPRESS)
        return action.help if silent else f"{action.help} (default: %(default)s)"


def _usage(parser: argparse.ArgumentParser) -> str:
    needed = [a for a in parser._actions if a.required]
    shown = [
        f"{a.option_strings[0]} {a.metavar or a.dest.upper()}"
        if a.option_strings
        else "{" + ",".join(a.choices) + "}"
        for a in needed
    ]
    return " ".join([parser.prog, *shown, "[options]"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kdgqa",
        description="Grouped query attention for Vision Transformers in JAX.",
        epilog="kdgqa COMMAND --help shows the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"kdgqa-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_flags, run) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=None if name in _WITHOUT_CONFIG else _OVERRIDES,
            formatter_class=_Help,
        )
        add_flags(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.usage = _usage(command)
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one sentence on standard error."""
    arguments, arguments_left = _parser().parse_known_args(argv)
    arguments.overrides = arguments_left
    memory.share_arenas()
    try:
        if arguments_left and arguments.command in _WITHOUT_CONFIG:
            names = vars(arguments).keys() - {"command", "run", "overrides"}
            flags = sorted(f"--{name.replace('_', '-')}" for name in names)
            raise unknown("argument", arguments_left[0], flags)
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("kdgqa: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Preempted as stop:
        print(f"kdgqa {arguments.command}: {stop}; the same command goes on", file=sys.stderr)
        status = 128 + signal.SIGTERM
        if getattr(arguments, "multihost", False):
            from kdgqa_jax import processes

            processes.part(status)
        return status
    except Exception as error:
        if arguments.debug:
            raise
        from kdgqa_jax import processes

        joined = getattr(arguments, "multihost", False)
        if isinstance(error, UserError):
            text = str(error)
        elif joined:
            text = f"another process of this run has ended, it seems ({_one_line(error)});"
            text += f" {processes.GONE}"
        else:
            text = f"{type(error).__name__}: {error} (--debug shows the traceback)"
        if joined:
            processes.leave(text)
        print(f"kdgqa {arguments.command}: {text}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


if __name__ == "__main__":
    sys.exit(main())
