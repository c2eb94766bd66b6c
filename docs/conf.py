"""How Sphinx builds the site: pages in Markdown, settings from the models, no network."""

import sys
from pathlib import Path

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
html_show_sphinx = False
templates_path: list[str] = []
myst_heading_anchors = 3
autodoc_typehints = "none"  # the types stand in the signatures' texts; no inventory is fetched
copybutton_prompt_text = ""
pygments_style, pygments_dark_style = "friendly", "monokai"


def setup(app: Sphinx) -> None:
    """Have shell commands coloured as such, and the settings filled in."""
    app.add_lexer("console", BashLexer)  # our blocks hold what is typed, without prompts
    app.connect("source-read", settings.fill_in)
