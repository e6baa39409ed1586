"""What every file keeps to: sizes, words, docstrings, help, arrows between modules."""

import argparse
import ast
import functools
import graphlib
import pathlib
import re

import pytest

from kdgqa_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "kdgqa_jax").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PROGRAMS = [*sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "docs").glob("*.py"))]
TESTS = sorted((ROOT / "tests").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def place(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


# --- sizes --------------------------------------------------------------------------------------

FILE_LINES, FUNCTION_LINES = 450, 80
LONG = {"_train_and_evaluate"}  # one script, to be read from top to bottom


def lines_of_code(function):
    """Without the docstring, which may be as long as it has to be."""
    start = function.body[1] if ast.get_docstring(function) and function.body[1:] else function
    return function.end_lineno - start.lineno + 1


def test_files_and_functions_can_be_read_in_one_sitting():
    files = [*PACKAGE, *CONFIGS, *PROGRAMS, *TESTS]
    long = {
        str(p.relative_to(ROOT)): n
        for p in files
        if (n := len(p.read_text().splitlines())) > FILE_LINES
    }
    for path in files:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and node.name not in LONG:
                count = lines_of_code(node)
                if count > FUNCTION_LINES:
                    long[f"{place(path, node)} {node.name}"] = count
    assert not long


# --- words --------------------------------------------------------------------------------------

WORDS = {
    r"\b(told|tells)\b": "said, says, reported, passed",
    r"\bbears?\b": "tolerates, fits",
    r"\bof old\b": "of earlier versions",
    r"\banew\b": "again, newly initialised",
    r"\bgoes on\b": "resumes, continues",
    r"\bworked off\b": "processed",
    r"\b(is|are|can be) had\b": "obtained, available",
    r"\bforgiv": "accepts",
    r"\bgives? back\b": "return, trim",
}
"""Words that readers stumble over, and what to write."""


def texts(path):
    """(place, text) of the strings of a program: what users read is among them."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield place(path, node), node.value


def test_plain_words():
    found = []
    pages = [(f"{p.relative_to(ROOT)}", p.read_text()) for p in PAGES if p.name != "CHANGELOG.md"]
    for where, text in [*pages, *(t for p in [*PACKAGE, *CONFIGS, *PROGRAMS] for t in texts(p))]:
        found += [(where, m[0], better) for word, better in WORDS.items()
                  if (m := re.search(word, text))]  # fmt: skip
    assert not found


def test_plain_names():
    """Of functions, methods and classes, tests among them: words apart."""
    found = []
    for path in [*PACKAGE, *CONFIGS, *PROGRAMS, *TESTS]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                words = node.name.replace("_", " ")
                found += [(place(path, node), node.name, better) for word, better in WORDS.items()
                          if re.search(word, words)]  # fmt: skip
    assert not found


# --- docstrings, help ---------------------------------------------------------------------------


def test_what_is_public_has_a_docstring():
    bare = []
    for path in [*PACKAGE, *CONFIGS]:
        tree = parsed(path)
        nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        bare += [place(path, n) for n in nodes if n.name[0] != "_" and not ast.get_docstring(n)]
        bare += [] if ast.get_docstring(tree) else [f"{path}: the module"]
    assert not bare


def test_every_flag_of_every_command_has_help():
    silent = [
        f"kdgqa {name} {action.option_strings or action.dest}"
        for name, parser in cli.build_parsers().items()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert not silent


# --- arrows -------------------------------------------------------------------------------------


def imported(path, names):
    """The modules of the package that one imports when it is imported."""
    for node in parsed(path).body:  # not inside functions, nor for type checkers alone
        if isinstance(node, ast.ImportFrom) and node.module in names:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
            yield from below
            if len(below) < len(node.names) and node.module != "kdgqa_jax":
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circle_of_imports_between_modules():
    names = {module_name(path): path for path in PACKAGE}
    graph = {name: set(imported(path, names)) - {name} for name, path in names.items()}
    assert {"kdgqa_jax.rules", "kdgqa_jax.options"} <= graph["kdgqa_jax.attention"]
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")
