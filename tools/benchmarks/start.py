"""How long a user waits for the first thing to happen: help, the import, a prediction. Each in a new process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any

from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks.machine import NoiseWatch
from vlprompt.core.errors import VLPromptError

__all__ = ["PREDICTION", "bench_start"]

PREDICTION = """
import numpy, vlprompt
from PIL import Image
backbone = vlprompt.create_backbone("tiny")
learner = vlprompt.create_learner("zero_shot", backbone, classnames=["circle", "square"])
vlprompt.predict(learner, Image.fromarray(numpy.zeros((64, 64, 3), dtype=numpy.uint8)))
"""
_PROGRAMS = {
    "nothing": ["-c", ""],
    "help": ["-m", "vlprompt", "--help"],
    "import": ["-c", "import vlprompt"],
    "libraries": ["-c", "import torch, open_clip"],
    "prediction": ["-c", PREDICTION],
}


@BENCHMARKS.register(
    "start", summary="seconds of --help, of the import and of the first prediction with tiny"
)
def bench_start(*, repeats: Annotated[int, Field(ge=1)] = 5) -> dict[str, Any]:
    """Start new Python processes, in turns; medians of wall-clock and processor seconds.

    ``nothing`` is Python alone, ``libraries`` is the import of torch and open_clip, which no prediction can do without.

    Args:
        repeats: Counted runs of each; one more fills the system's caches.
    """
    watch = NoiseWatch()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in _PROGRAMS}
    for number in range(repeats + 1):
        for name, arguments in _PROGRAMS.items():
            took = _run(arguments)
            if number:
                runs[name].append(took)

    noise = watch.noise()
    rows = {}
    for name, times in runs.items():
        walls, processors = zip(*times, strict=True)
        rows[name] = {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(processors)}
    return {"repeats": repeats, "quiet": noise is None or noise.quiet, **rows}


def _run(arguments: list[str]) -> tuple[float, float]:
    """Return the wall-clock and processor seconds of a Python program."""
    before = os.times()
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started

    after = os.times()
    if done.returncode:
        raise VLPromptError(f"python {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, own
