"""What the terminal shows of names that hold anything: in all characters, and in ASCII alone."""

import io
import os
import subprocess
import sys

import helpers
import pytest
from rich.cells import cell_len
from source_helpers import noise, save

from kdgqa_jax import checkpoint, console, errors, vit

NAMES = (
    "cat[red].png",
    "x[/foo].png",
    ":smile:.png",
    "[bold]",
    "a\nb\x1b[31m.png",
    "é猫\udcff.png",
)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_tables_and_lines_show_names_as_they_are(monkeypatch, encoding):
    """Nothing in them is markup or an emoji; what cannot be shown is escaped."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="strict"))
    console.prepare()
    console.table(("name[/]", "[red]x"), [[name, name] for name in NAMES], "a [b] title")
    console.say("é猫\udcff[red] " + "\n")
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    for name in ("cat[red].png", "x[/foo].png", ":smile:.png", "[bold]", "name[/]", "a [b] title"):
        assert name in shown
    assert shown.count("cat[red].png") == 2 and "\x1b" not in shown
    assert (
        r"a\nb\x1b[31m.png" in shown and r"\udcff" in shown and shown.endswith(r"[red] \n" + "\n")
    )
    assert ("é猫" if encoding == "utf-8" else r"\u732b") in shown
    table, _ = shown.rsplit("\n", 1)
    table = table.splitlines()[1:-1]  # without the title and the line that was said
    assert len({cell_len(line) for line in table}) == 1  # columns are straight


def test_long_names_are_folded_not_cut(monkeypatch):
    """Where a terminal is narrow."""
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    console.table(("image", "class"), [["x" * 100 + ".png", "cat"]])
    assert out.getvalue().count("x") == 100 and "…" not in out.getvalue()


def test_errors_are_one_line():
    assert errors.printable("a\nb\r\x1b\x85\u2028é") == r"a\nb\r\x1b\x85\u2028é"


def test_commands_speak_ascii(tmp_path):
    """Classes and files with other names, where the locale has ASCII alone."""
    arguments = {"name": "mu/4", "depth": 1, "image_size": 8, "num_classes": 2, "attention": "gqa"}
    variables = helpers.vit_variables(vit.create(**arguments), channels=3)
    description = {"model": arguments, "channels": 3, "class_names": ["猫[/é]", "b"],
                   "preprocessing": {}}  # fmt: skip
    checkpoint.save_model(tmp_path / "model", variables, description)
    save(tmp_path / "dä[/foo].png", noise(0, 8, 8, 3))
    strict = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "JAX_PLATFORMS": "cpu"}

    def run(place):
        command = [sys.executable, "-m", "kdgqa_jax.cli", "predict", "--images", str(place)]
        command += ["--checkpoint", str(tmp_path / "model")]
        return subprocess.run(command, env=os.environ | strict, capture_output=True, timeout=300)

    done = run(tmp_path / "dä[/foo].png")
    assert done.returncode == 0, done.stderr
    assert rb"[/foo].png" in done.stdout and rb"\u732b[/\xe9]" in done.stdout
    done = run(tmp_path / "nicht_dä.png")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1 and b"not found" in done.stderr
