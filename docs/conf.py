"""Sphinx: pages in Markdown, and the reference out of docstrings with the `code` and $formulas$ of Markdown."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402
import offline  # noqa: E402

from hf_lnfree.version import __version__  # noqa: E402

project, author, release = "hf_lnfree", "the hf_lnfree authors", __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser", "mathml"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # which makes one dash of the two of a flag
html_theme, html_title = "furo", f"hf_lnfree {release}"
html_math_renderer = "mathml"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_mock_imports = generate.OF_EXTRAS
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of transformers stay there
napoleon_custom_sections = [("Buffers", "params_style"), ("Example", "notes_style")]
suppress_warnings = ["config.cache"]
exclude_patterns = ["_build", "reference/generated/*.json.md"]  # included in files.md

ROLES = [(r"\[`([^`]+)`\]", r"`\1`"), (r"(?<![\\$`])\$([^$]+)\$", r":math:`\1`")]


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    text = "\n".join(lines)
    for markdown, rst in ROLES:
        text = re.sub(markdown, rst, text)
    lines[:] = text.split("\n")


def only_ours(app, what, name, obj, skip, options) -> bool | None:
    """Leave out functions of other libraries that stand in a module under a name of ours."""
    return True if callable(obj) and not str(getattr(obj, "__module__", "")).startswith("hf_lnfree") else None


def generated(app) -> None:
    generate.write(HERE / "reference" / "generated")


def listing(app, pagename, templatename, context, doctree) -> None:
    """The listing of a module stands alone: a tree of all pages beside each of 195 takes as long as all the rest."""
    if pagename.startswith("_modules/"):
        context["toctree"] = lambda **options: ""


def stays_offline(app, error) -> None:
    """A page that needs a network to be read is an error."""
    if error is None and app.builder.name == "html" and (found := list(offline.loads(Path(app.outdir)))):
        raise SystemExit("\n".join(found))


def setup(app) -> None:
    app.connect("builder-inited", generated)
    app.connect("autodoc-skip-member", only_ours)
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
    app.connect("html-page-context", listing, priority=400)  # before the theme
    app.connect("build-finished", stays_offline)
