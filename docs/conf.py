"""The documentation site: `sphinx-build -W docs build/site`."""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import option_tables

from kdgqa_jax.version import __version__

project = "kdgqa-jax"
release = __version__
copyright = "the authors of kdgqa-jax, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"kdgqa-jax {release}"
default_role = "code"  # docstrings set names in single backticks
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
suppress_warnings = ["myst.header"]

_OF_THE_REPOSITORY = re.compile(r"\]\((?!https?:|#|\.\./|docs/)([^)]+)\)")


def _read(app, name, source):
    """Pages that lie elsewhere, with links from where they are here; tables made from fields."""
    root = pathlib.Path(app.srcdir).parent
    if name == "index":
        readme = _OF_THE_REPOSITORY.sub(r"](../\1)", (root / "README.md").read_text())
        source[0] = readme.replace("](docs/", "](") + source[0]
    elif name == "changelog":
        source[0] = (root / "CHANGELOG.md").read_text().replace("](docs/", "](")
    elif name == "options":
        source[0] += option_tables.pages()
    for page, here in (("README.md", "index.md"), ("CHANGELOG.md", "changelog.md")):
        source[0] = source[0].replace(f"](../{page}", f"]({here}")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _read)
