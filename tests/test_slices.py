"""Compiling for slices that are not here: what is asked of the compiler, and what is said."""

import json
import sys

import pytest

from kdgqa_jax import cli, slices
from kdgqa_jax.errors import UserError

COMPILER = """#!{python}
import json, sys
assert sys.argv[1:3] == ["-m", "kdgqa_jax.slices"]
request = json.loads(sys.argv[3])
count = request["per_chip_batch"] or 4
memory = 10**9 + count * {per_image}
answer = {{"per_chip_batch": count, "chips": 4, "fits": memory <= 16 * 2**30}}
if answer["fits"]:
    answer |= {{"memory_bytes": memory, "seconds": 0.01, "utilisation": 0.25, "asked": request}}
    answer |= {{"compile_seconds": 3.0, "collectives": {{"all-reduce": [2, 2**20]}}}}
    answer["carried"] = {{"all-reduce": {{"norms, forward": 0, "mlp, backward": 2**20}}}}
    answer["kernels"] = {{"attention, forward": 12, "attention, backward": 24}}
else:
    answer["why"] = "too much"
if "{error}" in request["overrides"]:
    answer = {{"error": "no such thing"}}
print("something else")
print(json.dumps(answer))
"""


@pytest.fixture
def compiler(tmp_path):
    """Writes a stand-in for the Python that has the compiler; memory grows by image."""

    def write(per_image=2**26, error="never"):
        path = tmp_path / "python"
        path.write_text(COMPILER.format(python=sys.executable, per_image=per_image, error=error))
        path.chmod(0o755)
        return str(path)

    return write


def test_rows_are_compared_and_written(compiler, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["compile", "--config", "testing", "--topology", "v5e:2x2", "--json", str(file)]
    arguments += ["--compare", "model.attention=gqa,mesh.fsdp=2", "--config.batch_size=8"]
    assert cli.main([*arguments, "--python", compiler()]) == 0
    rows = json.loads(file.read_text())["results"]
    assert [row["name"] for row in rows] == ["testing", "model.attention=gqa,mesh.fsdp=2"]
    more = ["--config.model.attention=gqa", "--config.mesh.fsdp=2"]
    assert rows[1]["asked"]["overrides"] == ["--config.batch_size=8", *more]
    assert rows[0]["asked"]["step"] == "train" and rows[0]["asked"]["topology"] == "v5e:2x2"
    shown = capsys.readouterr().out
    assert "10.0 ms and 36 kernels" in shown and "25%" in shown and "2 all-reduce, 1 MiB" in shown
    assert "(mlp, backward 1, norms, forward 0)" in " ".join(shown.split())


def test_axes_of_a_mesh_are_fields_of_the_config(compiler, tmp_path, capsys):
    file = tmp_path / "figures.json"
    arguments = ["compile", "--config", "testing", "--topology", "v5e:2x2", "--json", str(file)]
    assert cli.main([*arguments, "--mesh", "fsdp=4", "--python", compiler()]) == 0
    (row,) = json.loads(file.read_text())["results"]
    assert row["asked"]["overrides"] == ["--config.mesh.fsdp=4"]
    assert cli.main([*arguments, "--mesh", "data=4"]) == 2
    assert "'data=4' must be sizes of axes, such as fsdp=4,model=2" in capsys.readouterr().err


@pytest.mark.parametrize("per_image", [2**24, 10**8, 2**26, 2**30])
def test_the_largest_batch_that_fits(compiler, per_image):
    (row,) = slices.compile_for_slice(
        "testing", [], "v5e:2x2", per_chip_batch="auto", python=compiler(per_image)
    )
    fitting = (16 * 2**30 - 10**9) // per_image
    assert row["fits"] and row["per_chip_batch"] == fitting // 8 * 8


def test_a_step_that_never_fits_says_so(compiler, capsys):
    (row,) = slices.compile_for_slice(
        "testing", [], "v5e:2x2", per_chip_batch="auto", python=compiler(2**32)
    )
    assert not row["fits"] and "does not fit: too much" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "python", "says"),
    [
        ("h100:8", None, r"--topology h100:8: expected a chip \(v4, v5e, v5p, v6e\) and a shape"),
        ("v5e", None, "--topology v5e: expected a chip"),
        ("v5e:2x2", "/nowhere/python", r"--python /nowhere/python cannot be run \(No such file"),
        ("v5e:2x2", "/bin/true", r"the compiler ended with status 0 \(no output\)"),
        ("v5e:2x2", sys.executable, r"the TPU compiler cannot be had for v5e:2x2 .*kdgqa-jax\[aot"),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(topology, python, says):
    with pytest.raises(UserError, match=says) as error:
        slices.compile_for_slice("testing", [], topology, python=python or sys.executable)
    assert "\n" not in str(error.value)


def test_the_error_of_the_compiler_and_bad_fields(compiler, capsys):
    python = compiler(error="--config.seed=1")
    with pytest.raises(UserError, match="no such thing"):
        slices.compile_for_slice("testing", ["--config.seed=1"], "v5e:2x2", python=python)
    command = ["compile", "--config", "testing", "--topology", "v5e:2x2", "--python", python]
    assert cli.main([*command, "--compare", "model.atention=gqa"]) == 1
    assert "unknown config field 'model.atention'" in capsys.readouterr().err
