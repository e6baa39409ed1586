"""The notebooks: run from a clean kernel, as they are; each asserts its own results."""

import ast
import os
import pathlib
import sys

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.py"))
DECLARED = {"flax", "jax", "kdgqa_jax", "matplotlib", "numpy", "optax", "sklearn"}


def as_text(name):
    return jupytext.read(FOLDER / f"{name}.py")


def test_there_is_a_notebook_for_every_text_and_no_other():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NOTEBOOKS
    assert NOTEBOOKS == ["finetune", "merge", "own_model", "quickstart"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_their_texts_without_outputs(name):
    """`jupytext --to ipynb colab/*.py` writes them."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [[(c.cell_type, c.source) for c in x.cells] for x in (notebook, as_text(name))]
    assert cells[0] == cells[1]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports_are_declared(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    names = {n.name for x in ast.walk(tree) if isinstance(x, ast.Import) for n in x.names}
    names |= {x.module for x in ast.walk(tree) if isinstance(x, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert packages <= DECLARED | sys.stdlib_module_names


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.filterwarnings("ignore")  # those of other packages, about sockets and loops
def test_notebooks_run(name, tmp_path):
    environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path), "MPLBACKEND": "agg"}
    client = nbclient.NotebookClient(
        as_text(name),
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": tmp_path}},
    )
    client.execute(env=environment)
    printed = [
        o for c in client.nb.cells for o in c.get("outputs", ()) if o.output_type == "stream"
    ]
    assert printed
