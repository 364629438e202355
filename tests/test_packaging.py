"""What an import may do, what the lists promise, and what a wheel carries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vlprompt

ROOT = Path(__file__).parent.parent
LISTS = sorted(name for name in vlprompt.__all__ if name.startswith("list_"))

# Audit hooks see every socket and every file opened for writing, whatever library does it.
WATCH = """
import json, os, sys
events = []
def watch(event, args):
    if event.startswith(("socket.", "urllib.")) or event in ("os.mkdir", "os.rename"):
        if "torchinductor" not in str(args[0]):  # PyTorch makes that one itself, in the temporary directory
            events.append([event, str(args[:2])])
    elif event == "open" and isinstance(args[0], str):
        writes = set(args[1] or "") & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and args[0] != os.devnull:
            events.append([event, args[0]])
sys.dont_write_bytecode = True
sys.addaudithook(watch)
"""
REPORT = "\nprint(json.dumps(events))\n"


def run_watched(code: str, folder: Path) -> list[list[str]]:
    """Run code in a fresh interpreter with an empty home; return what it wrote and where it connected to."""
    environment = {**os.environ, "HOME": str(folder), "MPLCONFIGDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code + REPORT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_writes_nothing_and_connects_to_nothing(tmp_path: Path) -> None:
    code = "before = dict(os.environ)\nimport vlprompt\nassert dict(os.environ) == before"
    assert run_watched(code, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_listing_connects_to_nothing_and_makes_no_cache(tmp_path: Path) -> None:
    calls = "\n".join(f"vlprompt.{name}()" for name in LISTS)
    events = run_watched(f"import vlprompt\n{calls}\n", tmp_path)
    assert [e for e in events if e[0].startswith(("socket", "urllib"))] == []
    assert not (tmp_path / ".cache" / "torch").exists()
    assert not (tmp_path / ".cache" / "huggingface").exists()


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_sorted_and_free_of_duplicates(name: str) -> None:
    names = getattr(vlprompt, name)()
    assert names == sorted(set(names))
    assert names, f"{name}() is empty"


def test_the_public_contract_is_importable() -> None:
    assert vlprompt.__all__ == sorted(vlprompt.__all__)
    assert all(getattr(vlprompt, name) is not None for name in vlprompt.__all__)


def test_a_wheel_carries_cards_configurations_weights_and_types(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, because setuptools leaves a build folder where it works
    for folder in ("vlprompt", "datasets", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True)
    inside = set(zipfile.ZipFile(next(tmp_path.glob("vlprompt-*.whl"))).namelist())
    assert {"vlprompt/py.typed", "vlprompt/experiments/report.html.j2"} <= inside
    for folder, installed in (("datasets", "vlprompt/cards"), ("configs", "vlprompt/configs")):
        files = {p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert {f"{installed}/{f}" for f in files} <= inside
    data = [p for s in ("py", "json", "safetensors") for p in (ROOT / "vlprompt").rglob(f"*.{s}")]
    assert {p.relative_to(ROOT).as_posix() for p in data} <= inside
    assert not [
        name for name in inside if name.startswith(("tests/", "tools/", "benchmarks/", "pretraining/"))
    ]
