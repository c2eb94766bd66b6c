"""How Sphinx builds the site: pages in Markdown, settings from the models, no network."""

import re
import sys
from pathlib import Path
from typing import Any

from pygments.lexers.shell import BashLexer
from sphinx.application import Sphinx

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import settings  # noqa: E402 - beside this file

project = "Latentmill"
author = "the authors of Latentmill"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
html_theme = "furo"
html_title = "Latentmill"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_static_path, html_css_files = ["site.css"], ["site.css"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the types stand in the signatures' texts; no inventory is fetched
pygments_style, pygments_dark_style = "friendly", "monokai"


def as_rst(_app: Sphinx, _what: str, _name: str, _obj: Any, _opts: Any, lines: list[str]) -> None:
    """Turn our docstrings, which are plain text with `code`, into Sphinx's language."""
    lines[:] = [re.sub(r"`([^`]+)`", r"``\1``", line.replace("*", r"\*")) for line in lines]


def setup(app: Sphinx) -> None:
    """Have shell commands coloured as such, the settings filled in, and docstrings understood."""
    app.add_lexer("console", BashLexer)  # our blocks hold what is typed, without prompts
    app.connect("source-read", settings.fill_in)
    app.connect("autodoc-process-docstring", as_rst)
