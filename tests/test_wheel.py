"""A wheel holds all that the commands need: they run from it, outside the checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("kdgqa_jax", "configs", "pyproject.toml", "README.md", "LICENSE")
STAGES = ("pretrain", "uptrain", "finetune")
TINY = [
    "--config.pretrain.epochs=0.05",  # one step
    *(f"--config.{stage}.epochs=0" for stage in STAGES[1:]),
    *(f"--config.{stage}.model.name=mini/4" for stage in STAGES),
]
COMMANDS = [
    ["study", "--config", "demo", "--workdir", "study", "--config.variants=gqa", *TINY],
    ["demo", "--workdir", "demo", "--variants", "gqa", *TINY],
    ["train", "--config", "testing", "--workdir", "run", "--config.epochs=0.1"],
]

CODE = """
import json, sys
import kdgqa_jax
from kdgqa_jax import cli
assert kdgqa_jax.__file__.startswith(sys.argv[1]), kdgqa_jax.__file__
for command in json.loads(sys.argv[2]):
    assert cli.main(command) == 0, command
"""


@pytest.mark.slow
def test_commands_run_from_a_wheel(tmp_path):
    """`demo`, `study` and `train` by the names of configs, in small."""
    sources, site, elsewhere = (tmp_path / name for name in ("src", "site", "elsewhere"))
    elsewhere.mkdir()
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*build, "--no-index", "-w", str(tmp_path), str(sources)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert (site / "kdgqa_jax" / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(site), json.dumps(COMMANDS)],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    for name in ("study", "demo"):
        assert "| gqa |" in (elsewhere / name / "report" / "results.md").read_text()
    assert (elsewhere / "run" / "model" / "model.json").is_file()
