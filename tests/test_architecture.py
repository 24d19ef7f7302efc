"""The levels of the package: imports only go down, and only the capture folder touches hooks and modes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deconvviz

PACKAGE = Path(deconvviz.__file__).parent
LEVELS = [
    ["__main__"],
    ["cli"],
    ["grid_commands", "occlude_command"],
    ["commands"],
    ["demo", "evolution"],
    ["demo_results"],
    ["filter_grid", "evolution_result"],
    ["explorer", "occlusion", "comparison", "diagnostics", "invariance", "correspondence", "evidence"],
    ["occlusion_maps"],
    ["deconvnet", "grid_layer"],
    ["check", "units", "targets", "unit_projection", "feature_map"],
    ["clean_passes", "sweep"],
    ["projection", "mining", "features", "incremental"],
    ["capture", "geometry", "diagnosis_result"],
    ["layers", "inputs", "windows", "fills", "shards", "refinement"],
    ["rules"],
    ["boxes", "switches"],
    ["tape"],
    ["model_zoo", "plotting"],
    ["models", "demo_data", "images", "weights_file", "spectrum"],
    ["memory"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports, at any depth; for type checking alone does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("deconvviz.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no level: add it to LEVELS"
    for other in imported(path) - {here}:
        if other in LEVEL:
            assert LEVEL[other] > LEVEL[here], f"{here} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_capture_touches_hooks_and_modes(path: Path) -> None:
    text = path.read_text()
    if part(path) != "capture":
        for word in ("register_forward", "register_full_backward", "TorchFunctionMode", "_forward_hooks"):
            assert word not in text, f"{path.name} uses {word}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text("from deconvviz.deconvnet import Deconvnet\nimport deconvviz.cli\n")
    assert imported(file) == {"deconvnet", "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_for_users(path: Path) -> None:
    assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
