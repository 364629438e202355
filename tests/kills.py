"""Killing runs: a run that is killed and started again must end with the files of an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAME = ("metrics.json", "results.jsonl", "report.html", "table.md")

_PROGRAM = """
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment
run_experiment(read_experiment("run.yaml"))
"""


def assert_kills_change_nothing(config: str, whole: Path, killed: Path, changes: Sequence[int]) -> None:
    """Run a configuration twice, once without a kill, and compare the results byte by byte.

    Args:
        config: YAML; ``output`` must be relative, since the report shows it.
        whole: Folder for the uninterrupted run.
        killed: Folder for the other.
        changes: The other is killed after so many new checkpoints and finished cells, once for each number.
    """
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "run.yaml").write_text(config)
        (folder / "start.py").write_text(_PROGRAM)
    assert _start(whole).wait() == 0

    for number in changes:
        running = _start(killed)
        _kill_after(running, killed, number)
    assert _start(killed).wait() == 0
    for name in SAME:
        assert _only(killed, name).read_bytes() == _only(whole, name).read_bytes(), name


def _start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "start.py"], cwd=folder, env=environment)


def _kill_after(running: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    """Kill a run when it has written so many checkpoints and cells."""
    seen: set[tuple[Path, int]] = _written(folder)
    new: set[tuple[Path, int]] = set()
    deadline = time.monotonic() + 300
    while len(new) < number and running.poll() is None and time.monotonic() < deadline:
        new |= _written(folder) - seen
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def _written(folder: Path) -> set[tuple[Path, int]]:
    written = set()
    for name in ("trainer.safetensors", "cell.json"):
        for path in folder.glob(f"runs/*/*/cells/**/{name}"):
            try:
                written.add((path, path.stat().st_mtime_ns))
            except FileNotFoundError:  # just being replaced
                continue
    return written


def _only(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"runs/*/*/{name}")
    return path
