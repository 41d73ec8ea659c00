"""Sphinx: pages in Markdown, and the reference out of docstrings with the `code` and $formulas$ of Markdown."""

import re

from hf_lnfree.version import __version__

project, author, release = "hf_lnfree", "the hf_lnfree authors", __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode", "myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme, html_title = "furo", f"hf_lnfree {release}"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of transformers stay there
napoleon_custom_sections = [("Buffers", "params_style"), ("Example", "notes_style")]
suppress_warnings = ["config.cache"]

ROLES = [(r"\[`([^`]+)`\]", r"`\1`"), (r"(?<![\\$`])\$([^$]+)\$", r":math:`\1`")]


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    text = "\n".join(lines)
    for markdown, rst in ROLES:
        text = re.sub(markdown, rst, text)
    lines[:] = text.split("\n")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
