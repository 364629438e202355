"""The house: which room may import which, and no circles. Imports inside functions count like all others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vlprompt"

# From the ground up. A room may import those before it; rooms of one line do not import each other.
FLOORS = [
    ["core"],
    ["backbones"],
    ["concepts"],
    ["data"],
    ["metrics"],
    ["text_search"],
    ["learners"],
    ["saved"],
    ["training"],
    ["meta"],
    ["diffusion"],
    ["experiments"],
    ["classification"],  # its fit and evaluate serve every learner
    ["adaptation", "detection", "generation", "security", "segmentation"],
    ["shards"],
    ["demo"],
    ["cli"],
]


def _modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["vlprompt", *path.relative_to(PACKAGE).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        modules[".".join(parts)] = path
    return modules


MODULES = _modules()


def _imports(module: str) -> Iterator[str]:
    """Yield the modules of ours that a module imports anywhere in its text."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in MODULES:
                    yield submodule
                elif node.module in MODULES:
                    yield str(node.module)


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor() -> None:
    rooms = {_room(module) for module in MODULES} - {"", "__main__"}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_nothing_lies_loose_at_the_root() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert sorted(loose) == ["__init__.py", "__main__.py"]


def test_arrows_point_down() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = []
    for module in MODULES:
        here = _room(module)
        if here not in floor_of:  # the package's own __init__ and __main__ stand on the roof
            continue
        for target in _imports(module):
            there = _room(target)
            if there != here and (there not in floor_of or floor_of[there] >= floor_of[here]):
                wrong.append(f"{module} -> {target}")
    assert not wrong, "\n".join(wrong)


def test_no_circles_between_files() -> None:
    graph = {module: set(_imports(module)) - {module} for module in MODULES}
    circles = [sorted(part) for part in _strong_parts(graph) if len(part) > 1]
    assert not circles, circles


def _strong_parts(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected parts (two searches in depth, Kosaraju)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str) -> None:
        if node in seen:
            return
        seen.add(node)
        for target in graph[node]:
            visit(target)
        order.append(node)

    for node in graph:
        visit(node)

    backwards: dict[str, set[str]] = {node: set() for node in graph}
    for node, targets in graph.items():
        for target in targets:
            backwards[target].add(node)

    parts = []
    assigned: set[str] = set()
    for root in reversed(order):
        part: set[str] = set()
        stack = [root]
        while stack:
            node = stack.pop()
            if node not in assigned:
                assigned.add(node)
                part.add(node)
                stack += backwards[node]
        if part:
            parts.append(part)
    return parts
