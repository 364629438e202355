"""Images in shards: images per second of one worker and of two, and memory against the number of images."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from benchmarks import BENCHMARKS
from vlprompt.data.captions import open_captions

__all__ = ["bench_shards"]

_PROGRAM = """
import sys
from vlprompt.core.memory import keep_freed_memory
keep_freed_memory()
from vlprompt.shards.job import Job, run_job
outcome = run_job(Job.model_validate_json(sys.argv[1]), sys.argv[2])
assert not outcome.failed and not outcome.unreadable
print(outcome.images)
"""
_LOOK_SECONDS = 0.2


@BENCHMARKS.register("shards", summary="images in shards: one worker, two workers, and memory")
def bench_shards(
    *,
    backbone: str = "tiny",
    images: Annotated[int, Field(ge=1)] = 500,
    shards: Annotated[int, Field(ge=2)] = 8,
    curve: Annotated[str, Field(pattern=r"^\d+( \d+)*$")] = "1 4 8",
    on: str = "processes:1 processes:2",
    threads: Annotated[int, Field(ge=1)] = 1,
) -> dict[str, Any]:
    """Encode drawn scenes (PNG, 64 px) that lie in archives, each way in a process of its own.

    Every archive holds the same scenes, which a reader doesn't know. A way that has two workers is compared with the
    same way that has one; seconds include the start of processes and the loading of the learner, so ``steady_per_s`` is
    told too: by how much longer all shards take than a quarter of them.

    Args:
        backbone: Any open_clip architecture, or tiny.
        images: In each shard.
        shards: How many there are.
        curve: Numbers of shards that memory is measured with, in one process.
        on: Executors that are compared with the first of them, for example ``"ray:workers=1 ray:workers=2"``.
        threads: Of each worker.
    """
    ways = on.split()
    quarter = max(1, shards // 4)
    counts = [int(word) for word in curve.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _draw(folder / "data", images, max(shards, *counts))

        speed = {}
        for way in ways:
            few = _run(folder, backbone, quarter, way, threads)
            whole = _run(folder, backbone, shards, way, threads)
            steady = images * (shards - quarter) / max(1e-9, whole["seconds"] - few["seconds"])
            speed[way] = {**whole, "per_s": images * shards / whole["seconds"], "steady_per_s": steady}

        memory = {count: _run(folder, backbone, count, "serial", threads)["peak_rss_gib"] for count in counts}

    first = speed[ways[0]]
    ratios = {way: row["steady_per_s"] / first["steady_per_s"] for way, row in speed.items()}
    return {
        "backbone": backbone,
        "images": images,
        "shards": shards,
        "threads": threads,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "speed": speed,
        "ratio": ratios,
        "peak_rss_gib": {str(count * images): value for count, value in memory.items()},
    }


def _draw(folder: Path, images: int, shards: int) -> None:
    """Write one archive of drawn scenes, and links to it."""
    folder.mkdir(parents=True)
    scenes = open_captions(f"scenes:{images}")
    first = folder / "00000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(images):
            out = io.BytesIO()
            scenes.image(number).save(out, "PNG")
            info = tarfile.TarInfo(f"{number:06d}.png")
            info.size = out.tell()
            out.seek(0)
            tar.addfile(info, out)
    for number in range(1, shards):
        os.link(first, folder / f"{number:05d}.tar")


def _run(folder: Path, backbone: str, shards: int, on: str, threads: int) -> dict[str, Any]:
    """Encode some shards in a new process; return its seconds, and the most memory of it and its children together."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    job = {
        "kind": "encode",
        "data": f"tar:{folder / 'data'}/{{00000..{shards - 1:05d}}}.tar",
        "folder": str(out),
        "backbone": {"name": backbone},
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, json.dumps(job), on], env=environment)
    peak = [0.0]
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, peak, done))
    watch.start()
    status = process.wait()
    done.set()
    watch.join()
    assert status == 0, f"{on} ended with {status}"
    return {"seconds": time.perf_counter() - started, "peak_rss_gib": peak[0]}


def _watch(pid: int, peak: list[float], done: threading.Event) -> None:
    while not done.wait(_LOOK_SECONDS):
        peak[0] = max(peak[0], _resident_gib(pid))


def _resident_gib(pid: int) -> float:
    """Return the memory of a process and its children; pages that they share count for each."""
    total = 0.0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            total += int(line.split()[1]) / 2**20
    return total + sum(_resident_gib(int(child)) for child in children)
