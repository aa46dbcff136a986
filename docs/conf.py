"""How Sphinx builds these pages: `make docs`, or `python -m sphinx -W -n -b html docs build/docs`.

Sphinx was taken because it is maintained, reads the docstrings as they stand (napoleon), and can fail on every warning:
a link to a page, a heading or a name that does not exist ends the build. The Material theme of mkdocs is said to be in
maintenance only. furo is the theme, and myst-parser reads Markdown, so that the pages can be read on GitHub as well.
The build needs no network: only links inside the project are followed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # commands.py

import commands

import renyi_engine

project = "renyi-engine"
author = "the authors of renyi-engine"
version = release = getattr(renyi_engine, "__version__", "")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = "renyi-engine"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

# `name` in a docstring is code; types of other libraries have no page here to link to
default_role = "code"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|transformers|collections|pathlib|typing|types|contextlib|numpy)\..*")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False


def setup(app):
    app.connect("source-read", add_commands)


def add_commands(app, page, source):
    """The page of commands ends in what argparse knows of each of them."""
    if page == "commands":
        source[0] += commands.reference()
