"""The core needs jax, flax and numpy alone; any other package that is missing is one sentence."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import pytest

import kdgqa_jax
from kdgqa_jax import extras
from kdgqa_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CORE = ("allocation", "attention", "block", "kernels", "rules", "vit")
OF_FLAX = {"rich"}  # which Flax itself imports

BLOCKING = """
import importlib.abc, importlib.metadata, re, sys

class Blocked(importlib.abc.MetaPathFinder):
    def __init__(self, names): self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def needed_by(*projects):
    found = set()
    while projects:
        project, *projects = projects
        if project not in found:
            found.add(project)
            try:
                needs = importlib.metadata.requires(project) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            needs = [need.lower() for need in needs if "extra ==" not in need]
            projects += [re.split("[^a-z0-9._-]", need)[0] for need in needs]
    return {re.sub("[-_.]+", "-", project) for project in found}

def block(extra_packages):
    allowed = needed_by("jax", "flax", "numpy", "kdgqa-jax")
    packages = importlib.metadata.packages_distributions()
    others = {name for name, owners in packages.items() if not
              {re.sub("[-_.]+", "-", owner.lower()) for owner in owners} & allowed}
    sys.meta_path.insert(0, Blocked(others | set(extra_packages)))
"""


def child(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def blocked_packages():
    return sorted({p for packages in extras.EXTRAS.values() for p in packages} - OF_FLAX)


def test_the_core_needs_jax_flax_and_numpy_alone():
    code = f"""{BLOCKING}
block({blocked_packages()!r})
from kdgqa_jax import {", ".join(CORE)}
import jax, kdgqa_jax
model = kdgqa_jax.create("mu/4", attention="kdgqa", image_size=8)
vit.variable_shapes(model)
layer = kdgqa_jax.GroupedQueryAttention(attention.configure("dgqa_ema", 4, 2))
shapes = jax.eval_shape(layer.init, jax.random.key(0), jax.numpy.ones((1, 3, 8)))
print(*sorted(shapes["params"]))
try:
    import safetensors
except ModuleNotFoundError:
    print("blocked")
"""
    assert child(code).splitlines() == ["key out query value", "blocked"]


COMMANDS = {
    "convert": ["convert", "--source", "x", "--out", "y"],
    "predict": ["predict", "--checkpoint", "x", "--images", "y"],
    "train": ["train", "--config", "testing", "--workdir", "x"],
    "evaluate": ["evaluate", "--checkpoint", "x", "--dataset", "digits"],
    "study": ["study", "--config", "demo", "--workdir", "x"],
    "demo": ["demo", "--workdir", "x"],
    "prepare": ["prepare", "--dataset", "digits"],
}


def test_commands_without_their_packages_name_the_extra(tmp_path):
    """Help works; each command is one sentence with the extra of its row, and leaves nothing."""
    code = f"""{BLOCKING}
import contextlib, io, json
block({blocked_packages()!r})
from kdgqa_jax import cli
assert "jax" not in sys.modules  # the command line starts without it
found = {{}}
for name, argv in json.loads({json.dumps(json.dumps(COMMANDS))}).items():
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        status = cli.main(argv)
    found[name] = status, error.getvalue()
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.main(["--help"])
print(json.dumps(found))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    from kdgqa_jax import cli

    for name, (status, text) in json.loads(result.stdout).items():
        extra = cli.COMMANDS[name].extra
        expected = rf'kdgqa {name}: .*needs the package \w+: pip install "kdgqa-jax\[{extra}\]"\n'
        assert status == 1 and re.fullmatch(expected, text), (name, text)
    assert list(tmp_path.iterdir()) == []


PAIRS = [(extra, package) for extra, packages in extras.EXTRAS.items() for package in packages]


@pytest.mark.parametrize(("extra", "package"), PAIRS)
def test_every_package_of_every_extra_is_one_sentence(monkeypatch, extra, package):
    monkeypatch.setitem(sys.modules, package, None)
    says = rf'^kdgqa needs the package {package}: pip install "kdgqa-jax\[{extra}\]"$'
    with pytest.raises(UserError, match=says), extras.named("kdgqa", extra):
        __import__(package)
    with pytest.raises(ImportError, match=rf"^this needs the package {package}: .*, or stay$"):
        extras.needs(package, instead="stay")
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    extras.needs(package)


def test_what_is_no_package_of_an_extra_is_raised_as_it_is():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), extras.named():
        import no_such_package  # noqa: F401


def test_modules_of_the_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    for name in ("kdgqa_jax.optim", "kdgqa_jax.train_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(vars(kdgqa_jax), "optim", raising=False)
    with pytest.raises(UserError, match=r'package optax: pip install "kdgqa-jax\[train\]"'):
        from kdgqa_jax import optim  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'optimm'"):
        _ = kdgqa_jax.optimm


DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "orbax": "orbax-checkpoint"}


def test_the_extras_of_pyproject_install_what_the_table_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"]
    names = [re.split(r"[^\w.-]", line)[0] for line in project["dependencies"]]
    assert names == ["jax", "flax", "numpy"]

    def installed(extra):
        found = set()
        for line in declared[extra]:
            name, *rest = re.split(r"[\[\]<>=,;]", line)
            found |= set().union(*map(installed, rest[:-1])) if name == "kdgqa-jax" else {name}
        return {re.sub("[-_.]+", "-", name.strip().lower()) for name in found}

    for extra, packages in extras.EXTRAS.items():
        expected = {DISTRIBUTIONS.get(p, p).replace("_", "-").lower() for p in packages}
        assert installed(extra) == expected, extra
    # The process that compiles for a slice builds the whole training step of a recipe.
    assert installed("aot") == installed("train") | {"jax"}
