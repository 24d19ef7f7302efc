"""The levels of the package: imports only go down, and only the capture folder touches hooks and modes."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import deconvviz

PACKAGE = Path(deconvviz.__file__).parent
LEVELS = [
    ["__main__"],
    ["cli"],
    ["demo", "evolution"],
    ["filter_grid"],
    ["explorer", "comparison", "diagnostics", "invariance", "correspondence", "evidence"],
    ["occlusion"],
    ["deconvnet", "grid"],
    ["check", "units", "targets"],
    ["projection", "mining", "features", "incremental"],
    ["capture", "geometry"],
    ["layers", "inputs", "shards"],
    ["rules"],
    ["boxes", "switches"],
    ["tape"],
    ["models", "plotting", "templates"],
    ["images"],
    ["memory", "precision", "files"],
    ["errors"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: Path) -> set[str]:
    """What a file imports, at any depth; for type checking alone does not count."""
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
    return names


def imported(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    return {name.split(".")[1] for name in modules(path) if name.startswith("deconvviz.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = part(path)
    if here == "__init__":
        return
    assert here in LEVEL, f"{here} has no level: add it to LEVELS"
    for other in imported(path) - {here}:
        if other in LEVEL:
            assert LEVEL[other] > LEVEL[here], f"{here} imports {other}, which is not below it"


def test_no_import_goes_round() -> None:
    """Nor between the files of one folder."""
    dotted = {".".join(("deconvviz", *p.relative_to(PACKAGE).with_suffix("").parts)): p for p in FILES}
    names = {name.removesuffix(".__init__"): path for name, path in dotted.items()}
    graph = {}
    for name, path in names.items():
        found = {other if other in names else other.rpartition(".")[0] for other in modules(path)}
        graph[name] = {other for other in found if other in names and other != name} - {"deconvviz"}
    assert sum(map(len, graph.values())) > 200
    TopologicalSorter(graph).prepare()


def test_the_map_names_every_part() -> None:
    drawn = str(deconvviz.__doc__).partition("::")[2]
    assert {part(path) for path in FILES} - {"__init__", "__main__"} <= set(re.findall(r"\w+", drawn))


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
