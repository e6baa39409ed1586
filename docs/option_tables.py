"""Tables of all options, from the fields that declare them and what is written beside them."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from kdgqa_jax import attention, config, vit
from kdgqa_jax.block import BlockConfig


def pages() -> str:
    """Markdown: the options of models, of training runs and of studies."""
    return "\n".join(
        [
            "## Of a model",
            "",
            "`vit.create(NAME, OPTION=VALUE)`, or `--config.model.OPTION=VALUE`.",
            "",
            *table(("option", "default", "choices", "what it is"), model_rows()),
            "",
            "## Of a training run",
            "",
            "`--config.FIELD=VALUE`.",
            "",
            *table(("field", "default", "what it is"), config_rows(config.train_config)),
            "",
            "## Of a study",
            "",
            "`pretrain`, `uptrain` and `finetune` have the fields of a training run.",
            "",
            *table(("field", "default", "what it is"), config_rows(config.study_config)),
            "",
        ]
    )


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    for row in (header, ("---",) * len(header), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def model_rows() -> Iterator[tuple[str, str, str, str]]:
    """(name, default, choices, description) of every option of `vit.create`."""
    parts = [vit.VisionTransformer, BlockConfig, attention.AttentionConfig]
    for variant in attention.VARIANTS.values():
        parts += [part for part in variant.parts if part not in parts]
    said = {name: text for part in parts for name, text in described(part).items()}
    for name, field in sorted(vit.known_options().items()):
        missing = field.default is dataclasses.MISSING
        choices = field.metadata["choices"] or ()
        yield (
            f"`{name}`",
            "" if missing else f"`{field.default!r}`",
            ", ".join(f"`{choice}`" for choice in choices),
            said.get(name, ""),
        )


def described(kind: type) -> dict[str, str]:
    """Field -> what the section Attributes of a class says of it, and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        for name, said in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE):
            found[name] = " ".join(said.split())
    return found


def config_rows(declare: Any) -> Iterator[tuple[str, str, str]]:
    """(dotted name, default, comment) of the fields that a function of config.py declares."""
    source = inspect.getsource(declare)
    lines = source.splitlines()
    (dictionary,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Return))
    yield from _fields(dictionary.value.args[0], "", lines)


def _fields(node: ast.Dict, prefix: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(value, ast.Dict):
            yield from _fields(value, f"{prefix}{key.value}.", lines)
        else:
            shown = ast.unparse(value)
            yield f"`{prefix}{key.value}`", f"`{shown}`", _comment(lines, key.lineno - 1)


def _comment(lines: list[str], number: int) -> str:
    """What stands behind a line, or on the lines of comments before it."""
    behind = re.search(r"[,{]\s+# (.*)$", lines[number])
    if behind:
        return behind[1]
    above: list[str] = []
    while (line := lines[number - 1 - len(above)].strip()).startswith("# "):
        above.insert(0, line.removeprefix("# "))
    return " ".join(above)
