"""Page faults of repeated encodings: the C library's allocator as commands set it, and as it comes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Annotated, Any

from pydantic import Field

from benchmarks import BENCHMARKS
from vlprompt.core.errors import VLPromptError
from vlprompt.core.memory import SWITCH

__all__ = ["bench_memory"]

_PROGRAM = """
import json, resource, sys, time
from vlprompt.core.memory import keep_freed_memory
keep_freed_memory()
import torch
from vlprompt import create_backbone
name, batch, batches, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
tower = create_backbone(name)
images = torch.randn(batch, 3, *tower.image_size, generator=torch.Generator().manual_seed(0))
for _ in range(2):
    tower.encode_image(images)
before = resource.getrusage(resource.RUSAGE_SELF)
started = time.perf_counter()
for _ in range(batches):
    tower.encode_image(images)
seconds = time.perf_counter() - started
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "page_faults": (after.ru_minflt - before.ru_minflt) / batches,
    "seconds": seconds / batches,
    "user_s": (after.ru_utime - before.ru_utime) / batches,
    "system_s": (after.ru_stime - before.ru_stime) / batches,
    "peak_rss_gib": after.ru_maxrss / 2**20,
}))
"""


@BENCHMARKS.register("memory", summary="page faults of encoding batch after batch, and what they cost")
def bench_memory(
    *,
    backbone: str = "photo",
    batch: Annotated[int, Field(ge=1)] = 64,
    batches: Annotated[int, Field(ge=1)] = 5,
    threads: Annotated[int, Field(ge=1)] = 2,
    repeats: Annotated[int, Field(ge=1)] = 3,
) -> dict[str, Any]:
    """Encode batches in new processes, now with the allocator that keeps freed memory, now with the system's.

    Figures are medians per batch; ``cpu_ratio`` is processor time of the system's over that of ours, the median of
    pairs.

    Args:
        backbone: Any open_clip architecture, photo, photo-vit or tiny.
        batch: Images per batch.
        batches: Counted batches of each process; two more come first.
        threads: Threads of the processor.
        repeats: Counted pairs of processes.
    """
    runs: dict[str, list[dict[str, float]]] = {"kept": [], "system": []}
    for pair in range(repeats):
        for way in (*runs,) if pair % 2 == 0 else reversed(runs):
            runs[way].append(_run(way, [backbone, *map(str, (batch, batches, threads))]))

    pairs = zip(runs["system"], runs["kept"], strict=True)
    ratios = [(s["user_s"] + s["system_s"]) / (k["user_s"] + k["system_s"]) for s, k in pairs]
    return {
        "backbone": backbone,
        "batch": batch,
        "threads": threads,
        **{way: _medians(rows) for way, rows in runs.items()},
        "cpu_ratio": statistics.median(ratios),
    }


def _run(way: str, arguments: list[str]) -> dict[str, float]:
    environment = {**os.environ, SWITCH: "system" if way == "system" else ""}
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VLPromptError(f"encoding failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}
