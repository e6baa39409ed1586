"""The command line: `kdgqa COMMAND`. Flags only; the work is done by the modules."""

import argparse
import sys
from collections.abc import Callable, Sequence

from kdgqa_jax.errors import UserError
from kdgqa_jax.version import __version__


def _demo(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, study

    settings = config.load_config(f"demo:dataset={arguments.dataset}")
    for stage in (settings.pretrain, settings.uptrain, settings.finetune):
        stage.data.data_dir = arguments.data_dir
    settings.seeds, settings.seed = arguments.seeds, arguments.seed
    settings.variants = tuple(arguments.variants.split(","))
    study.run_study(config.override(settings, arguments.overrides), arguments.workdir)


def _study(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, study

    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    study.run_study(settings, arguments.workdir)


def _train(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import config, train
    from kdgqa_jax.console import say

    settings = config.override(config.load_config(arguments.config), arguments.overrides)
    result = train.train_and_evaluate(settings, arguments.workdir)
    say(
        f"test top-1 {result['top1']:.2f} % (best {result['best_top1']:.2f} %), top-5"
        f" {result['top5']:.2f} %, loss {result['loss']:.4f}; model in {arguments.workdir}/model"
    )


def _bench(arguments: argparse.Namespace) -> None:
    from kdgqa_jax import bench, config

    settings = bench.bench_config(
        arguments.model, arguments.num_kv_heads, arguments.batch_size, arguments.dtype
    )
    settings = config.override(settings, arguments.overrides)
    bench.bench_train(settings, arguments.variants.split(","), arguments.steps)


_OVERRIDES = "any other field of the config: --config.FIELD=VALUE"


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from kdgqa_jax.attention import VARIANTS

    _add_workdir(parser)
    parser.add_argument("--dataset", default="digits", help="digits or fashion_mnist")
    parser.add_argument("--data-dir", default="", help="where the files of fashion_mnist lie")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--seed", type=int, default=42, help="the first seed")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="attention variants, with commas"
    )


def _add_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="directory of the run")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["train"], help="what is measured")
    parser.add_argument("--model", default="B/16", help="SIZE/PATCH")
    parser.add_argument("--variants", default="gqa,kdgqa,dgqa_ema", help="the first one is the 1")
    parser.add_argument("--num-kv-heads", type=int, help="key/value heads; none: half")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--dtype", default="bfloat16", help="of the computation")
    parser.add_argument("--steps", type=int, default=5, help="steps timed; 0: compile only")


def _add_config(parser: argparse.ArgumentParser) -> None:
    _add_workdir(parser)
    parser.add_argument("--config", required=True, help="NAME[:key=value,...] or a .py file")


COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "demo": ("the whole protocol on small real images, minutes on a laptop", _add_demo, _demo),
    "study": ("the protocol of a config: variants x seeds, a table, plots", _add_config, _study),
    "train": ("one training run of a config", _add_config, _train),
    "bench": ("memory and rate of the variants on this device", _add_bench, _bench),
}
"""Command: (what it does, adds its flags, runs it)."""


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
            epilog=_OVERRIDES,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add_flags(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks")
        command.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one sentence on standard error."""
    arguments, arguments_left = _parser().parse_known_args(argv)
    arguments.overrides = arguments_left
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("kdgqa: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, UserError):
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error} (--debug shows the traceback)"
        print(f"kdgqa {arguments.command}: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
