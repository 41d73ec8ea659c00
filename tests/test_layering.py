"""Imports run one way, from the lower floors to the upper: FLOORS; and models travels alone."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_lnfree"
FLOORS = [
    *("models", "attention", "analysis", "data", "conversion", "training", "removal", "studies", "sharing", "pages"),
    *("evaluation", "metrics", "cli"),
]
ONLY_IN = {"matplotlib": {"pages/plots.py", "pages/report.py"}, "jinja2": {"pages/report.py"}}
UPWARD = {("training", "sharing"), ("training", "pages"), ("removal", "sharing"), ("removal", "pages")}  # still there


def imports(path):
    """(level, module) of every import statement."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    parts = path.relative_to(PACKAGE).parts
    for level, module in imports(path):
        by_path = parts[0] == "metrics" and len(parts) == 3  # evaluate copies these files elsewhere
        assert by_path or not module.startswith("hf_lnfree"), f"{module}: imports inside the package are relative"
        top = module.split(".")[0]
        if level == 0 and top in ONLY_IN:
            assert "/".join(parts) in ONLY_IN[top]
        if len(parts) == 1:
            continue
        if level == 2 and top in FLOORS:
            if (parts[0], top) in UPWARD or (parts[0], module) == ("studies", "pages.study"):
                continue
            assert FLOORS.index(top) < FLOORS.index(parts[0]), f"{'/'.join(parts)} imports upwards from {module}"
        if parts[0] == "models":
            allowed = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
            assert (level == 1 and module and "." not in module) or (level == 0 and top in allowed), (level, module)
