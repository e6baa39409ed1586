"""Command lines drawn at random: each does its work, or is refused in one sentence.

    python tests/fuzz_command_line.py --count 500 --seed 0

Flags come from the parsers, fields from the configs, so that new ones are drawn as soon as they are
there. Every command line starts from one that works on tiny inputs, and is changed in a few places.
Most run in one process, some in one of their own. `Case.faults` has what must not happen.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is drawn from the network

import jax
import numpy as np
from PIL import Image

from kdgqa_jax import checkpoint, cli, config, convert, vit

SECONDS = 600  # more than any of them may take on a busy machine, compilation included
MEMORY = 24 * 2**30  # of address space: what wants more fails instead of filling the machine

TINY_RUN = ("model.name=mu/4", "model.image_size=8", "epochs=0.02", "batch_size=32")
TINY_STUDY = tuple(
    f"--config.{stage}.{field}"
    for stage in ("pretrain", "uptrain", "finetune")
    for field in TINY_RUN
)
BENCH_STEPS = (
    *("--model=mu/4", "--batch-size=2", "--rounds=1", "--variants=gqa"),
    "--config.model.image_size=8",
)
WORKS: dict[str, tuple[str, ...]] = {
    "demo": (
        *("--workdir=OUT", "--variants=gqa", *TINY_STUDY),
        *("--config.uptrain.epochs=0", "--config.finetune.epochs=0"),
    ),
    "study": (
        *("--workdir=OUT", "--config=demo", "--config.variants=kdgqa", *TINY_STUDY),
        "--config.uptrain.epochs=0",
    ),
    "train": ("--workdir=OUT", "--config=testing", *(f"--config.{field}" for field in TINY_RUN)),
    "prepare": ("--dataset=folder:IN/tree",),
    "convert": ("--source=IN/model", "--out=OUT", "--attention=gqa"),
    "evaluate": ("--checkpoint=IN/model", "--dataset=folder:IN/tree"),
    "predict": ("--checkpoint=IN/model", "--images", "IN/tree"),
    "inspect": ("--checkpoint=IN/model",),
    "export": ("--checkpoint=IN/model", "--out=OUT/model.npz", "--platforms=cpu"),
    "card": ("--checkpoint=IN/model", "--out=OUT/card.md"),
    "analyse": ("--checkpoint=IN/model", "--images=IN/tree", "--out=OUT", "--noise-scales=1"),
    "report": ("--workdir=IN/run",),
    "compile": ("--config=testing", "--topology=v5e:2x2", "--python=IN/compiler"),
    "bench train": BENCH_STEPS,
    "bench eval": BENCH_STEPS,
    "bench data": ("--images=8", "--image-size=8", "--batch-size=2", "--workers=0"),
    "bench convert": ("--model=mu/4",),
}
"""By command: arguments with which it succeeds. IN and OUT stand for folders."""

FITTING: dict[str, tuple[str, ...]] = {
    "config": ("demo", "testing", "IN/good.py", "pretrain:model=mu/4", "testing:kv=2"),
    "source": ("IN/model", "IN/weights.safetensors", "IN/ours.safetensors", "IN/mha"),
    "checkpoint": ("IN/model", "IN/mha"),
    "images": ("IN/tree", "IN/tree/a/[red] ☃.png", "IN/x.npy"),
    "out": ("OUT/a.json", "OUT/a.csv", "OUT/a.npy", "OUT/a.safetensors"),
    "to": ("safetensors", "released"),
    "dataset": ("digits", "folder:IN/tree", "mnist", "tfds:mnist"),
    "calibration": ("digits", "IN/tree"),
    "attention": ("mha", "kdgqa", "dgqa_ema", "pgqa"),
    "variants": ("gqa", "kdgqa", "gqa@svd"),
    "pooling": ("first", "svd", "procrustes"),
    "shift": ("negative", "quarter_turn"),
    "json": ("OUT/a.json", "OUT/a.csv"),
    "noise_scales": ("0,1", "2"),
    "baselines": ("gqa", "gqa,mha"),
    "peer": ("torch",),
    "topology": ("v5e:4x4", "v6e:2x2", "v4:2x2x1"),
    "per_chip_batch": ("auto", "64"),
    "compare": ("model.attention=gqa", "model.remat=full,mesh.fsdp=2"),
}
"""By name: values that make sense for a flag or field, besides small numbers."""

ODD = (
    *("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "-0.5", "1.5", "3", "x", "None", "true"),
    *("2147483647", "2147483648", "9" * 30, "9" * 5000, "0x10", "1,2", ",", "1,nan", "8x8", "8x"),
    *("gs://bucket/x", "s3://bucket", "hdfs://h/x", "file:///x", "hf:", "hf:a/b", "folder:"),
    *("folder:gs://b", "tfds:", "IN/missing", "IN/model/model.json", "IN/text.txt", "IN/empty"),
    *("IN/returns_nothing.py", "IN/broken.py", "IN/imports.py", "IN/raises.py", "IN/none.py"),
    *("ünï ☃", "[red]", "[/foo]", "a\nb", "-", "%s {0}", "x" * 300, "~", "demo:kv=", ":", "=", "@"),
    *("float33", "float16", "gqa@svd+", "gqa,gqa", "mha@svd", "testing:attention=mha,kv=3"),
)
"""Values that hardly any flag or field takes."""

COMPILER = f"""#!{sys.executable}
print('{{"per_chip_batch": 8, "chips": 4, "fits": false, "why": "this is no compiler"}}')
"""
"""Answers for the Python that has the compiler for slices."""

CONFIGS = {
    "good": "from kdgqa_jax.configs.testing import get_config\n",
    "returns_nothing": "def get_config(arg):\n    pass\n",
    "broken": "def get_config(arg:\n",
    "imports": "import no_such_module\n",
    "raises": "def get_config(arg):\n    return 1 / 0\n",
    "none": "x = 1\n",
}


def make_inputs(folder: pathlib.Path) -> None:
    """Tiny real inputs: models, weights, images, an array, config files."""
    folder.mkdir(parents=True)
    for name, attention in (("model", "kdgqa"), ("mha", "mha")):
        arguments = {"name": "mu/4", "depth": 2, "image_size": 8, "num_classes": 2}
        arguments |= {"attention": attention}
        variables = vit.init_variables(vit.create(**arguments), jax.random.key(0))
        about = {"class_names": ["a", "b"], "preprocessing": {"mean": 0.5, "std": 0.5}}
        about |= {"model": arguments, "channels": 3}
        checkpoint.save_model(folder / name, variables, about)
    convert.export(folder / "mha", folder / "ours.safetensors")
    shutil.copy(folder / "mha" / checkpoint.WEIGHTS, folder / "weights.safetensors")
    rng = np.random.default_rng(0)
    np.save(folder / "x.npy", rng.standard_normal((2, 8, 8, 3), np.float32))
    for name in ("a", "b"):
        (folder / "tree" / name).mkdir(parents=True)
        for file in ("[red] ☃", "1", "2"):
            image = Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8))
            image.save(folder / "tree" / name / f"{file}.png")
    (folder / "compiler").write_text(COMPILER)
    (folder / "compiler").chmod(0o755)
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps(config.train_config().to_dict()))
    (folder / "text.txt").write_text("hello")
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text(text)


# --- Drawing ------------------------------------------------------------------------------------


def _flags(command: str) -> list[argparse.Action]:
    """Those of a command, but for --help."""
    actions = cli.build_parsers()[command]._actions
    return [a for a in actions if a.option_strings and a.dest not in ("help", "debug")]


def _fields(arguments: list[str]) -> list[str]:
    """Names of the fields of the config that a command line has."""
    name = next((a.removeprefix("--config=") for a in arguments if a.startswith("--config=")), "")
    known = config.study_config() if name.startswith("demo") else config.train_config()
    return list(config._fields(known))


def _value(rng: random.Random, name: str) -> str:
    fitting = FITTING.get(name.rsplit(".", 1)[-1], ("1", "2"))
    return rng.choice(fitting if rng.random() < 0.4 else ODD)


def draw(rng: random.Random, refused: bool = False) -> list[str]:
    """A command line; if it shall be `refused`, one without training."""
    command = rng.choice([*WORKS, "convert", "predict", "evaluate", "inspect", "prepare"])
    has_config = cli.COMMANDS[command].has_config
    arguments = list(WORKS[command])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        kind = rng.random()
        if kind < 0.08 and arguments:
            arguments.pop(rng.randrange(len(arguments)))
        elif kind < 0.12:
            arguments.append(rng.choice(["--nope", "--nope=1", "word", "--config.nope=1", *ODD]))
        elif has_config and kind < 0.6:
            field = rng.choice(_fields([f"--config={command}", *arguments]))
            arguments.append(f"--config.{field}={_value(rng, field)}")
        else:
            flag = rng.choice(_flags(command))
            arguments.append(flag.option_strings[0])
            if flag.nargs != 0:
                arguments[-1] += f"={_value(rng, flag.dest)}"
    if refused:
        arguments = [a for a in arguments if a != "--multihost"]
        if has_config or command == "prepare":
            arguments.append("--config.optim.nope=1")
    return [*command.split(), *arguments]


# --- Running ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A command line and what came of it."""

    arguments: list[str]
    status: int | None = None  # None: it has not ended by itself
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    stray: list[str] = dataclasses.field(default_factory=list)

    def faults(self) -> list[str]:
        """What must not happen."""
        lines = [x for x in self.err.splitlines() if not x.startswith("kdgqa convert: warning:")]
        sentence = len(lines) == 1 and lines[0].startswith("kdgqa")
        checks = {
            f"status {self.status}": self.status not in (0, 1, 2),
            "a traceback": "Traceback" in self.out + self.err,
            "an error that nobody expected": "--debug shows" in self.err,
            f"{len(lines)} lines on standard error": bool(self.status) and not sentence,
            f"{self.seconds:.0f} s": self.seconds > SECONDS,
            f"stray files {self.stray[:5]}": bool(self.stray),
        }
        return [name for name, holds in checks.items() if holds]


class TooLongError(BaseException):
    """It takes more than `SECONDS`."""


def _give_up(*_):
    raise TooLongError


def _in_process(arguments: list[str]) -> tuple[int | None, str, str]:
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    except TooLongError:
        status = None
    finally:
        signal.alarm(0)
    return status, out.getvalue(), err.getvalue()


def _in_its_own_process(arguments: list[str]) -> tuple[int | None, str, str]:
    command = [sys.executable, "-m", "kdgqa_jax.cli", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, "", ""
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def _files(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    stats = {p: p.stat() for p in folder.rglob("*") if p.is_file()}
    return {str(p.relative_to(folder)): (s.st_size, s.st_mtime_ns) for p, s in stats.items()}


def run(arguments: list[str], inputs: pathlib.Path, folder: pathlib.Path, alone: bool) -> Case:
    """Run a command line in `folder`, which is made for it and gets a copy of the inputs."""
    shutil.copytree(inputs, folder / "in")
    given = [a.replace("IN", "in").replace("OUT", "out/x") for a in arguments]
    before, here = _files(folder), pathlib.Path.cwd()
    os.chdir(folder)
    started = time.monotonic()
    try:
        status, out, err = (_in_its_own_process if alone else _in_process)(given)
    finally:
        os.chdir(here)
    case = Case(arguments, status, out, err, time.monotonic() - started)
    changed = [name for name, stat in _files(folder).items() if before.get(name) != stat]
    asked = [a.partition("=")[2] for a in given if a.startswith("--")]
    places = [str(pathlib.PurePath(place)) for place in asked if place]
    case.stray = [
        name
        for name in changed
        if ".partial" in name or not any(f"{name}/".startswith(f"{place}/") for place in places)
    ]
    return case


def cases(
    seed: int,
    first: int,
    count: int,
    folder: pathlib.Path,
    cheap: bool = False,
    begin: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, Case]]:
    """Draw and run `count` command lines from the `first` on; those of a seed are always the same.

    Args:
      seed: of the draws.
      first: number of the first one.
      count: how many.
      folder: scratch.
      cheap: none that trains or starts a process.
      begin: called with the number of each before it runs.
    """
    if not (folder / "inputs").exists():
        make_inputs(folder / "inputs")
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        arguments = draw(rng, refused=cheap)
        alone = not cheap and (rng.random() < 0.04 or "--multihost" in arguments)
        place = folder / f"case{number}"
        place.mkdir()
        begin(number)
        yield number, run(arguments, folder / "inputs", place, alone)
        shutil.rmtree(place)


# --- The command --------------------------------------------------------------------------------


def _work(seed: int, first: int, count: int, folder: pathlib.Path) -> None:
    """Run command lines, and print what came of each as a line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def tell(number: int, **record: Any) -> None:
        print(json.dumps({"number": number, **record}), flush=True)

    for number, case in cases(seed, first, count, folder, begin=tell):
        tell(number, **dataclasses.asdict(case))


def _results(seed: int, count: int, folder: pathlib.Path):
    """(number, case or None) of every command line; None: it has ended the process."""
    first = 0
    while first < count:
        command = [sys.executable, __file__, "--worker", f"--seed={seed}", f"--folder={folder}"]
        command += [f"--first={first}", f"--count={count - first}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            begun = -1
            for line in worker.stdout:
                record = json.loads(line)
                begun = number = record.pop("number")
                if record:
                    yield number, Case(**record)
                    begun = -1
                    first = number + 1
        if begun >= 0:
            yield begun, None
            first = begun + 1
        elif first < count:
            raise SystemExit(f"the worker has ended with status {worker.returncode}")


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this one alone, in this process")
    parser.add_argument("--folder", type=pathlib.Path, help="scratch; none: a new one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.seed, arguments.first, arguments.count, arguments.folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="kdgqa_fuzz_") as made:
        folder = arguments.folder or pathlib.Path(made)
        # Most of the time goes into compiling, and the same programs come up again and again.
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        if arguments.only is not None:
            print(*cases(arguments.seed, arguments.only, 1, folder))
            return 0
        faulty, statuses = 0, {}
        for number, case in _results(arguments.seed, arguments.count, folder):
            if case is None:
                print(f"{number}: ended the process")
            else:
                statuses[case.status] = statuses.get(case.status, 0) + 1
            if case is None or case.faults():
                faulty += 1
            if case and case.faults():
                print(f"{number}: {', '.join(case.faults())}\n  kdgqa {case.arguments}")
                print(f"  {case.err[-600:]}", flush=True)
            if number % 50 == 49:
                print(f"{number + 1} done, by exit status {statuses}", flush=True)
    print(f"{arguments.count} command lines, by exit status {statuses}; {faulty} with faults")
    return int(faulty > 0)


if __name__ == "__main__":
    sys.exit(_main())
