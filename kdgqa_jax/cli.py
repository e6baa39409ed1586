"""The command line: `kdgqa COMMAND`. Flags are in flags.py, what they do in commands.py."""

import argparse
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from kdgqa_jax import commands, console, extras, flags, memory, parsers
from kdgqa_jax.errors import Preempted, UserError, one_line, printable, unknown
from kdgqa_jax.version import __version__


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of `COMMANDS`.

    Attributes:
      summary: what it does.
      add_flags: adds its flags to a parser.
      run: does it, by the flags.
      has_config: takes --config.FIELD=VALUE.
      resumes: the same command finishes what was interrupted.
      extra: what installs the packages that it needs: a name in `extras.EXTRAS`.
    """

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    has_config: bool = False
    resumes: bool = False
    extra: str = "train"


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole protocol on small real images, in minutes",
        flags.add_demo,
        commands.run_demo,
        has_config=True,
        resumes=True,
        extra="demo",
    ),
    "study": Command(
        "the protocol of a config: variants x seeds, a table, plots",
        flags.add_study,
        commands.run_study,
        has_config=True,
        resumes=True,
        extra="demo",
    ),
    "report": Command(
        "tables, plots and a page of a study or a training run",
        flags.add_report,
        commands.run_report,
        extra="demo",
    ),
    "train": Command(
        "one training run of a config",
        flags.add_train,
        commands.run_train,
        has_config=True,
        resumes=True,
    ),
    "prepare": Command(
        "download a data set, or say how to get it; count it",
        flags.add_prepare,
        commands.run_prepare,
        extra="data",
    ),
    "convert": Command(
        "a checkpoint to a grouped variant, or back to PyTorch",
        flags.add_convert,
        commands.run_convert,
        extra="convert",
    ),
    "merge-encoder": Command(
        "an encoder of transformers with fewer key/value heads",
        flags.add_merge_encoder,
        commands.run_merge_encoder,
        extra="convert",
    ),
    "evaluate": Command(
        "accuracy and calibration on a data set", flags.add_evaluate, commands.run_evaluate
    ),
    "predict": Command(
        "logits or top classes of images", flags.add_predict, commands.run_predict, extra="convert"
    ),
    "export": Command(
        "a model as one file for JAX and NumPy, or as ONNX",
        flags.add_export,
        commands.run_export,
        extra="convert",
    ),
    "card": Command(
        "a model card: source, conversion, data, figures",
        flags.add_card,
        commands.run_card,
        extra="convert",
    ),
    "inspect": Command(
        "what a model directory holds", flags.add_inspect, commands.run_inspect, extra="convert"
    ),
    "analyse": Command(
        "how alike heads are, key norms and allocations over images",
        flags.add_analyse,
        commands.run_analyse,
    ),
    "compile": Command(
        "memory and time of a step on a TPU slice that is not here",
        flags.add_compile,
        commands.run_compile,
        has_config=True,
    ),
    "doctor": Command(
        "what this machine has, and what would hold a run back",
        flags.add_doctor,
        commands.run_doctor,
        has_config=True,
    ),
    "bench train": Command(
        "time and memory of training steps, variant by variant",
        flags.add_bench_steps,
        functools.partial(commands.run_bench_steps, "train"),
        has_config=True,
    ),
    "bench eval": Command(
        "time and memory of evaluation steps",
        flags.add_bench_steps,
        functools.partial(commands.run_bench_steps, "eval"),
        has_config=True,
    ),
    "bench data": Command(
        "images per second of every stage of the input pipeline",
        flags.add_bench_data,
        commands.run_bench_data,
        has_config=True,
    ),
    "bench convert": Command(
        "time and memory of a conversion",
        flags.add_bench_convert,
        commands.run_bench_convert,
        extra="convert",
    ),
}

GROUPS = {"bench": "what steps, data and conversions cost on this machine"}
"""The first words of commands that have two."""

RESUMES = "the same command resumes"


def build_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of everything, named "", and that of each command."""
    parser = parsers.Parser(
        prog="kdgqa",
        description="Grouped query attention for Vision Transformers in JAX.",
        epilog="kdgqa COMMAND --help shows the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"kdgqa-jax {__version__}")
    found: dict[str, argparse.ArgumentParser] = {"": parser}
    places = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    for name, command in COMMANDS.items():
        group, _, _ = name.rpartition(" ")
        if group not in places:
            summary = GROUPS[group]
            words = places[""].add_parser(group, help=summary, description=_sentence(summary))
            places[group] = words.add_subparsers(dest="command", required=True, metavar="WHAT")
        subparser = places[group].add_parser(
            name.split()[-1],
            help=command.summary,
            description=_sentence(command.summary),
            epilog="any other field of the config: --config.FIELD=VALUE"
            if command.has_config
            else None,
            formatter_class=parsers.Help,
        )
        command.add_flags(subparser)
        subparser.add_argument("--debug", action="store_true", help="show tracebacks")
        subparser.set_defaults(command=name)
        subparser.usage = parsers.usage(subparser)
        found[name] = subparser
    return found


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors are one sentence on standard error.

    0: done; 1: an error; 2: wrong flags; 130: interrupted; 143: preempted.
    """
    _open_standard_streams()
    console.prepare()
    try:
        arguments, overrides = build_parsers()[""].parse_known_args(argv)
    except parsers.WrongFlagsError as error:
        print(printable(error), file=sys.stderr)
        return 2
    arguments.overrides = overrides
    memory.share_arenas()
    command = COMMANDS[arguments.command]
    try:
        if arguments.overrides and not command.has_config:
            names = vars(arguments).keys() - {"command", "overrides"}
            known = sorted(f"--{name.replace('_', '-')}" for name in names)
            raise unknown("argument", arguments.overrides[0], known)
        with extras.named(f"kdgqa {arguments.command}", command.extra):
            command.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        hint = f"; {RESUMES}" if command.resumes else ""
        _complain(arguments, f"interrupted{hint}")
        return 128 + signal.SIGINT
    except Preempted as stop:
        _complain(arguments, f"{stop}; {RESUMES}")
        return _part(arguments, 128 + signal.SIGTERM)
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, OSError) and not error.filename and (reason := _output_fails()):
            gone = isinstance(error, BrokenPipeError)  # by whoever wanted no more: `| head`
            if not gone or command.resumes:
                hint = f"; {RESUMES}" if command.resumes else ""
                _complain(arguments, f"standard output cannot be written ({reason}){hint}")
            return 1
        return _fail(arguments, error)
    return 0


def _complain(arguments: argparse.Namespace, text: str) -> None:
    print(f"kdgqa {arguments.command}: {printable(text)}", file=sys.stderr)


def _part(arguments: argparse.Namespace, status: int) -> int:
    """The exit status; several processes end together."""
    if getattr(arguments, "multihost", False):
        from kdgqa_jax import processes  # which imports JAX, as most mistakes need not

        processes.part(status)
    return status


def _fail(arguments: argparse.Namespace, error: Exception) -> int:
    """Say what went wrong; the exit status."""
    joined = False
    if getattr(arguments, "multihost", False):
        from kdgqa_jax import processes

        joined = processes.joined()
    if isinstance(error, UserError):
        text = str(error)
    elif joined:
        reason = _described(error)
        text = f"another process of this run has ended, it seems ({reason}); {processes.GONE}"
    elif isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = f"there is not enough memory ({one_line(error)}); ask for less at a time"
    else:
        text = f"{_described(error)} (--debug shows the traceback)"
    if joined:
        processes.leave(text)
    _complain(arguments, text)
    return 1


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


# --- Standard streams ---------------------------------------------------------------------------


def _open_standard_streams() -> None:
    """Where the caller has closed a standard stream (`>&-`), there is the null device.

    Otherwise the next file to be opened would have its number, and get what is printed.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # so its number is the lowest that is free
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _output_fails() -> str:
    """Why standard output cannot be written, and makes it the null device; "" where it can be."""
    try:
        print(flush=True)  # where it has no buffer, what has failed before is forgotten
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # what is left in the buffer goes there at the end
        os.close(null)
        return error.strerror or str(error)
    return ""


def run() -> NoReturn:
    """The command `kdgqa`, as a process of its own."""
    if sys.argv[1:2] in ([name.split()[0]] for name, c in COMMANDS.items() if c.has_config):
        memory.request_huge_pages()  # those that train
    sys.exit(main())


if __name__ == "__main__":
    run()
