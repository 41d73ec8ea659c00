"""Imports lead down from floor to floor, and in no circle inside a room; and models travels alone.

Every import statement counts, inside functions and under TYPE_CHECKING too, and what a room's `__init__.pyi` exports.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_lnfree"
GROUND = "ground"  # the modules beside the rooms: all stand on them
FLOORS = [
    *(GROUND, "models", "attention", "analysis", "data", "conversion", "training", "removal", "studies", "sharing"),
    *("pages", "evaluation", "metrics", "cli"),
]
ONLY_IN = {
    "matplotlib": ("analysis/drawing.py", "pages/"),
    "jinja2": "pages/report.py",
    "gradio": "pages/explorer_app.py",
}


def files(package):
    return sorted(path for suffix in ("py", "pyi") for path in package.rglob(f"*.{suffix}"))


def imports(path):
    """(level, module, name) of everything that is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)


def room(path, package):
    """The folder that a module lies in, or the ground."""
    parts = path.relative_to(package).parts
    return parts[0] if len(parts) > 1 else GROUND


def imported(path, package):
    """The modules of the package that a file imports; for what a room exports, its `__init__.py`."""
    for level, module, name in imports(path):
        if level == 0 and module.split(".")[0] != package.name:
            continue
        start = path.parents[level - 1] if level else package.parent
        folder = start.joinpath(*filter(None, module.split(".")))
        modules = (folder / f"{name}.py", folder / name / "__init__.py", folder.with_suffix(".py"))
        yield next((file for file in modules if file.is_file()), folder / "__init__.py")


def upward(package, floors):
    """What is imported from a higher floor, as "importing file: imported module"."""
    for path in files(package):
        if path.parent == package and path.stem == "__init__":  # exports everything
            continue
        for target in imported(path, package):
            if floors.index(room(target, package)) > floors.index(room(path, package)):
                yield f"{path.relative_to(package)}: {target.relative_to(package)}"


def circle(package, name):
    """The modules of a room that import each other in a circle, first and last the same; [] if none do."""
    graph: dict = {}
    for path in files(package):
        if room(path, package) == name:
            of_room = {target for target in imported(path, package) if room(target, package) == name}
            graph.setdefault(path.with_suffix(".py"), set()).update(of_room)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [path.stem for path in error.args[1]]
    return []


def test_every_room_has_a_floor():
    assert {room(path, PACKAGE) for path in files(PACKAGE)} == set(FLOORS)


def test_imports_lead_down():
    assert list(upward(PACKAGE, FLOORS)) == []


@pytest.mark.parametrize("name", FLOORS)
def test_no_room_has_a_circle(name):
    assert circle(PACKAGE, name) == []


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_file_may_import(path):
    parts = path.relative_to(PACKAGE).parts
    for level, module, name in imports(path):
        by_path = parts[0] == "metrics" and len(parts) == 3  # evaluate copies these files elsewhere
        assert by_path or not module.startswith("hf_lnfree"), f"{module}: imports inside the package are relative"
        top = module.split(".")[0]
        if level == 0 and top in ONLY_IN:
            assert "/".join(parts).startswith(ONLY_IN[top])
        if parts[0] == "models":
            allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
            sibling = level == 1 and module and "." not in module
            assert sibling or (level == 0 and top in allowed), (level, module, name)


# The rules themselves, on a package of two rooms that breaks them


@pytest.fixture
def house(tmp_path):
    """What stands in each file of a package with the floors "low" and "high"."""

    def build(**contents):
        for room_name in ("low", "high"):
            (tmp_path / "house" / room_name).mkdir(parents=True)
            (tmp_path / "house" / room_name / "__init__.py").touch()
        (tmp_path / "house" / "__init__.py").touch()
        for name, text in contents.items():
            (tmp_path / "house" / name.replace("_", "/", 1)).with_suffix(".py").write_text(text)
        return tmp_path / "house"

    return build


@pytest.mark.parametrize(
    "text",
    [
        "from ..high.b import x",
        "from ..high import b",
        "from .. import high",
        "import house.high.b",
        "def f():\n    from ..high import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..high.b import x",
    ],
)
def test_an_import_from_above_is_seen(house, text):
    package = house(low_a=text, high_b="from ..low.a import y")
    assert [found.partition(":")[0] for found in upward(package, ["low", "high"])] == ["low/a.py"]


@pytest.mark.parametrize(
    "text",
    [
        "from .b import x",
        "from . import b",
        "from ..low.b import x",
        "def f():\n    from .b import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x",
    ],
)
def test_a_circle_is_seen(house, text):
    package = house(low_a=text, low_b="from .c import x", low_c="from .a import x")
    assert set(circle(package, "low")) == {"a", "b", "c"}
    assert circle(package, "high") == []
