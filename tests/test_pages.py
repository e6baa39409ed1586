"""Python in README and docs: every block is run, in small."""

import json
import pathlib
import re

import jax
import pytest
from test_plots import history, records

from kdgqa_jax import train, vit, workdir

ROOT = pathlib.Path(__file__).parents[1]
ELSEWHERE = {"docs/rules.md": "test_rules.py", "docs/export.md": "test_exported.py"}
SMALLER = {
    'create("S/16"': 'create("mu/4", image_size=8', '"S/16"': '"mu/4"',
    "num_kv_heads=3": "num_kv_heads=4", "224, 224": "8, 8",
    "train_config()": "small(train_config())", "(1000, 32, 32, 3)": "(1000, 8, 8, 3)",
}  # fmt: skip


def blocks():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        name = str(page.relative_to(ROOT))
        for number, code in enumerate(
            re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        ):
            yield pytest.param(name, code, id=f"{name}-{number}")


BLOCKS = list(blocks())


def small(config):
    config.model.image_size, config.batch_size, config.eval_batch_size = 8, 60, 50
    config.epochs, config.data.workers = 0.1, 0
    return config


def given(tmp_path):
    """What a page has spoken of before its code."""
    model = vit.create("mu/4", image_size=8, attention="kdgqa", num_kv_heads=4, num_classes=10)
    workdir.write_json(tmp_path / "report" / "results.json", records(("gqa",), ("uptrained",)))
    lines = "".join(f"{line}\n" for line in map(json.dumps, history()))
    (tmp_path / "metrics.jsonl").write_text(lines)
    return {
        "__name__": "documentation", "small": small, "model": model,
        "variables": vit.init_variables(model, jax.random.key(0)),
        "images": jax.numpy.ones((2, 8, 8, 3)),
        "study": tmp_path, "run": tmp_path, "folder": tmp_path,
    }  # fmt: skip


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_python_of_pages_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page in ELSEWHERE:
        assert page.removeprefix("docs/") in (ROOT / "tests" / ELSEWHERE[page]).read_text()
        return
    names = given(tmp_path)
    for large, less in SMALLER.items():
        code = code.replace(large, less)
    exec(code, names)
    if "get_config" in names:
        train.check(names["get_config"](""))
    if "result" in names:
        assert names["result"]["steps"] == 2


def test_pages_have_python():
    assert len(BLOCKS) >= 7
