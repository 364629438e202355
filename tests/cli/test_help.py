"""Help is instant and complete, the version is printed, and shells complete names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import Command
from vlprompt.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]

# Every package that takes long to import, and no help needs.
SLOW = (
    "torch",
    "numpy",
    "omegaconf",
    "open_clip",
    "pandas",
    "pydantic",
    "sklearn",
    "torchvision",
    "transformers",
)

PAGES = [
    [],
    *([name] for name in COMMANDS),
    *(["data", name] for name in ("list", "prepare", "check", "convert")),
    ["data", "convert", "coco"],
    ["data", "convert", "indexed"],
    *(["segment", name] for name in ("predict", "evaluate", "check")),
]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TERM": "dumb", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_help_imports_anything_slow() -> None:
    code = f"""
import contextlib, io, sys
from vlprompt.cli.app import main
for page in {PAGES!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*page, "--help"])
        except SystemExit as ended:
            assert not ended.code, page
    assert "Usage: vlprompt" in out.getvalue(), page
    loaded = [name for name in {SLOW!r} if name in sys.modules]
    assert not loaded, (page, loaded)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    done = python("-m", "vlprompt", "--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\s", done.stdout, re.MULTILINE)


def test_every_module_of_the_package_is_a_command_and_the_other_way_round() -> None:
    modules = {path.stem for path in (ROOT / "vlprompt" / "cli").glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} - {"app"} == set(COMMANDS)


def test_the_version(command: Command) -> None:
    import vlprompt

    answer = command("--version")
    assert answer.status == 0
    assert answer.out == f"vlprompt {vlprompt.__version__}\n"


def test_an_unknown_command_is_corrected(command: Command) -> None:
    answer = command("rnu")
    assert answer.status == 2
    assert "Did you mean 'run'" in answer.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vlprompt ru", "run"),
        ("vlprompt run quickst", "quickstart.yaml"),
        ("vlprompt run --restar", "--restart"),
        ("vlprompt list learn", "learners"),
    ],
)
def test_shells_complete_names(words: str, expected: str) -> None:
    done = python(
        "-m",
        "vlprompt",
        _VLPROMPT_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(words.count(" ")),
    )
    assert expected in done.stdout.split(), done.stderr


def test_completion_can_be_installed(tmp_path: Path) -> None:
    script = f"{sys.executable} -m vlprompt --install-completion"
    done = subprocess.run(
        ["bash", "-c", f"{script}; echo status $?"],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "status 0" in done.stdout, done.stderr
    assert "_VLPROMPT_COMPLETE" in (tmp_path / ".bash_completions" / "vlprompt.sh").read_text()
