"""How Sphinx builds these pages: `make docs`, or `python -m sphinx -W -n -b html docs build/docs`.

Sphinx was taken because it is well kept, reads the docstrings as they stand (napoleon), and can fail on every warning:
a link to a page, a heading or a name that does not exist ends the build. mkdocs, the other candidate, has had no
release since August 2024. furo is the theme, and myst-parser reads Markdown, so that GitHub shows the pages too.
Neither the build nor the built pages fetch anything from the network.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # commands.py

import commands
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import renyi_engine

project = "renyi-engine"
author = "the authors of renyi-engine"
version = release = getattr(renyi_engine, "__version__", "")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "renyi-engine"
html_show_copyright = False
html_math_renderer = "mathml"
smartquotes = False  # they make one dash of --flag
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

default_role = "code"  # `name` in a docstring
nitpicky = True
nitpick_ignore_regex = [
    ("py:exc", ".*"),  # what follows "Raises" is prose
    ("py:class", r"(torch|collections)\..*"),  # types of others, as dataclasses name them
]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types, shapes and units
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app):
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("source-read", add_commands)
    app.connect("autodoc-process-docstring", keep_as_prose, priority=400)  # before napoleon, at 500


def write_formula(writer, node):
    """As MathML, which browsers draw by themselves; MathJax would have to be fetched from elsewhere."""
    alone = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=alone)
    writer.body.append(f'<div class="math" style="padding: 0.5em 0">{formula}</div>' if alone else formula)
    raise nodes.SkipNode


def add_commands(app, page, source):
    """The page of commands ends in what argparse knows of each of them."""
    if page == "commands":
        source[0] += commands.reference()


def keep_as_prose(app, what, name, obj, options, lines):
    """Napoleon would take what stands before the first colon of an attribute's docstring for its type, but only if that
    colon is in the first line: an empty comment is put there."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]
