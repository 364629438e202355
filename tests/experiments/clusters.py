"""A Ray cluster of two nodes on this machine, and commands that run toys in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240  # seconds, on a machine that does other things too
_STORE_BYTES = 80 << 20
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}

_PROGRAM = """
import json, logging, sys
from tests.experiments.toys import Toy, ToyConfig
from vlprompt.cli._errors import exit_status
from vlprompt.experiments.runner import run_experiment

def run():
    options, call = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    return run_experiment(Toy(ToyConfig(task="toy", name="toy", **options)), **call).exit_code

sys.exit(exit_status(run))
"""


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[str]:
    """Yield the address of a cluster whose nodes have one core each; its files are gone afterwards."""
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: the names of sockets may not have many letters
    changes = {**ENVIRONMENT, "RAY_TMPDIR": scratch}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    Path(scratch, "ray").mkdir()
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for number in range(nodes):
            head = {"include_dashboard": False} if number == 0 else {}
            cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, **head)
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def start(options: dict[str, Any], **call: Any) -> subprocess.Popen[str]:
    """Run a toy in a process of its own; keywords as of ``run_experiment``."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(options), json.dumps(call)],
        env={**os.environ, **ENVIRONMENT},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Return what a condition comes to as soon as it holds."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
    return value


def owners(run: Path) -> dict[str, int]:
    """Return the name of every cell that is claimed, and the process that has it."""
    known = {}
    for path in run.glob("cells/*/.*.claim"):
        try:
            known[path.parent.name] = int(json.loads(path.read_text())["process"])
        except (OSError, ValueError):  # let go of in this moment
            continue
    return known


def lives(process: int) -> bool:
    """Return whether a process still computes."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def kill(process: int) -> None:
    """Kill a process, unless it has ended."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
