"""A config file that gives a config of a run or a study again: what differs from the defaults."""

from typing import Any

from ml_collections import ConfigDict

from kdgqa_jax import config as config_lib

_KINDS = {True: "study_config", False: "train_config"}


def is_study(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a study."""
    return "variants" in config


def _as_tuple(value: Any) -> Any:
    """Lists of JSON as the tuples of configs."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def changes(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """(dotted name, value) of the fields that differ from the defaults, or have none."""
    defaults = getattr(config_lib, _KINDS[is_study(config)])()

    def differing(values: dict[str, Any], defaults: Any, prefix: str) -> Any:
        for name, value in values.items():
            if not name.isidentifier():  # it becomes Python
                continue
            known = isinstance(defaults, ConfigDict) and name in defaults
            default = defaults[name] if known else None
            if isinstance(value, dict):
                yield from differing(value, default, f"{prefix}{name}.")
            elif not known or _as_tuple(value) != _as_tuple(default):
                yield prefix + name, _as_tuple(value)

    return list(differing(config, defaults, ""))


def config_file(config: dict[str, Any]) -> str:
    """A config file for `--config FILE.py`, from the content of config.json."""
    kind = _KINDS[is_study(config)]
    lines = [f"    config.{name} = {value!r}" for name, value in changes(config)]
    return "\n".join(
        [
            '"""What is not said here is as the defaults have it."""',
            "",
            f"from kdgqa_jax.config import {kind}",
            "",
            "",
            'def get_config(arg=""):',
            '    """The config of the report."""',
            f"    config = {kind}()",
            *lines,
            "    return config",
            "",
        ]
    )


def command(config: dict[str, Any], file: str = "config.py") -> str:
    """The command that runs it again."""
    what = "study" if is_study(config) else "train"
    return f"kdgqa {what} --config {file} --workdir AGAIN"
