"""Gates on size, documentation and what may never stand in the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("vlprompt/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("docs/**/*.py")])
PACKAGES = [
    p for p in SOURCES if p.relative_to(ROOT).parts[0] == "vlprompt" or p.parent.parent == ROOT / "tools"
]
MAX_FILE_LINES = 550  # with the blank lines that code needs to be read
MAX_FUNCTION_LINES = 70
TEXT = {".cfg", ".css", ".csv", ".j2", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
# Folders that exist on one machine only; registries and mirrors belong into that machine's pip configuration.
FORBIDDEN = re.compile(
    r"(?<![\w.~/])/(?:home|root|Users|work|opt|mnt|scratch|workspace)/[\w.-]+"
    r"|--(?:extra-)?index-url|--find-links|--trusted-host"
    r"|(?:pypi|pythonhosted|devpi|artifactory|nexus)\.[a-z]+/\w",
)


def documented(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module's public classes, functions and methods."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(
            node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                stack += node.body


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function's statements; arguments and documentation don't make it long."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - statements[0].lineno + 1 if statements else 0


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: body_lines(f) for f in functions if body_lines(f) > MAX_FUNCTION_LINES}
    assert long == {}, f"functions longer than {MAX_FUNCTION_LINES} lines: {long}"


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_everything_public_is_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.stat().st_size == 0 or ast.get_docstring(tree), "the module has no docstring"
    assert [n.name for n in documented(tree) if not ast.get_docstring(n)] == []


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_no_pickle_is_ever_loaded(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    for call in calls:
        called, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert called not in {"pickle.load", "pickle.loads", "joblib.load"}, f"line {call.lineno}"
        assert called != "torch.load" or given.get("weights_only") == "True", f"line {call.lineno}"
        assert given.get("allow_pickle", "False") == "False", f"line {call.lineno}"


def test_no_machine_path_and_no_registry_in_the_tree() -> None:
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix not in TEXT or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name_of(path)}: {m[0]}" for m in FORBIDDEN.finditer(text)]
    assert found == []


def test_the_gate_sees_what_it_is_for() -> None:
    assert FORBIDDEN.search("cache: /home/me/data")
    assert FORBIDDEN.search("pip install --extra-index-url x")
    assert not FORBIDDEN.search("see https://example.org/work/more and datasets/work/x.yaml, ~/work/x")
