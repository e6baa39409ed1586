"""The tables of options on the documentation site hold every option that there is."""

import importlib.util
import pathlib

import pytest

from kdgqa_jax import config, vit

PATH = pathlib.Path(__file__).parents[1] / "docs" / "option_tables.py"


@pytest.fixture(scope="module")
def option_tables():
    spec = importlib.util.spec_from_file_location("option_tables", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(rows):
    return {row[0].strip("`") for row in rows}


def test_every_option_of_a_model_is_described(option_tables):
    rows = list(option_tables.model_rows())
    assert names(rows) == vit.known_options().keys()
    assert not [name for name, *_, said in rows if not said]
    defaults = {name.strip("`"): default for name, default, *_ in rows}
    assert defaults["beta"] == "`0.9`" and defaults["window"] == "`300`"


def test_every_field_of_a_config_is_there_with_its_default(option_tables):
    fields = config._fields(config.train_config())
    expected = {name for name in fields if not name.startswith("model.")}
    rows = {name.strip("`"): default for name, default, _ in option_tables.train_rows()}
    assert rows.keys() == expected
    assert rows["optim.beta2"] == "`0.999`" and rows["data.augment.flip"] == "`False`"
    rows = names(option_tables.config_rows(config.study_config))
    own = {name.split(".")[0] for name in rows}
    assert own == {name.split(".")[0] for name in config._fields(config.study_config())}


def test_pages_are_markdown_tables_of_one_width(option_tables):
    lines = option_tables.pages().splitlines()
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
    assert widths == {4, 5}
