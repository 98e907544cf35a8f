"""Sphinx configuration."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import scorefn

project = "scorefn"
author = "The scorefn authors"
copyright = "2026, the scorefn authors"
version = release = scorefn.__version__

extensions = ["mathml", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False  # formulas are MathML: see mathml.py
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"scorefn {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def escape_bars(app, what, name, obj, options, lines):
    """Docstrings write |g| for a norm, where reStructuredText would read a substitution."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        lines[i] = "``".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars, priority=900)
