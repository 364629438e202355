"""Scanning a folder for triggers against running the image tower on ready tensors: what looking for triggers costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.bench import BENCHMARKS
from vlprompt.learners import create_learner
from vlprompt.security.scan import scan
from vlprompt.seeding import numpy_rng

__all__ = ["bench_scan"]

Seconds = tuple[float, float]  # by the clock, and of all threads


@BENCHMARKS.register("scan", summary="scanning files for triggers, against the image tower alone")
def bench_scan(
    *, backbone: str = "ViT-B-16", pictures: int = 64, batch: int = 16, workers: int = 2, repeats: int = 5
) -> dict[str, Any]:
    """Compare pictures per second; decoding, preprocessing, judging and the table are part of scanning.

    The tower gets the same pictures, decoded and preprocessed beforehand. ``ratio`` is of processor time (all
    threads), ``wall_ratio`` of the clock; both are at most 1 but for noise, since scanning runs the same tower. Each is
    the median over pairs of runs, now the tower first and now the scan, so that a machine whose speed drifts takes as
    much as it gives. The sentences of triggers and objects are encoded before the clock starts: once per scan, however
    many pictures there are.

    Args:
        backbone: Any open_clip architecture, or tiny.
        pictures: Files that are scanned; JPEG, as large as the tower's input.
        batch: Pictures per pass.
        workers: Threads that decode.
        repeats: Counted pairs of runs.
    """
    tower = create_backbone(backbone)
    detector = create_learner("dbom", tower, [f"object {i}" for i in range(10)]).eval()
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), pictures, tower.image_size)
        pixels = [tower.preprocess(Image.open(p).convert("RGB")) for p in sorted(Path(folder).iterdir())]
        batches = torch.stack(pixels).split(batch)

        def run_tower() -> None:
            for part in batches:
                tower.image_embeddings(part)

        def run_scan() -> None:
            scan(folder, detector, batch_size=batch, workers=workers)

        work = {"tower": run_tower, "scan": run_scan}
        for run in work.values():
            run()
        found: dict[str, list[Seconds]] = {name: [] for name in work}
        for repeat in range(max(1, repeats)):
            for name in (*work,) if repeat % 2 == 0 else reversed(work):
                found[name].append(_timed(work[name]))
    return {**_settings(tower, pictures, batch, workers), **_figures(pictures, found["tower"], found["scan"])}


def _timed(work: Callable[[], object]) -> Seconds:
    started, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu


def _figures(pictures: int, tower: list[Seconds], scanning: list[Seconds]) -> dict[str, Any]:
    """Return medians, and the ratio of every pair of runs."""
    wall, cpu = ([t[k] / s[k] for t, s in zip(tower, scanning, strict=True)] for k in range(2))
    rate = {
        name: pictures / median(t[0] for t in found) for name, found in (("tower", tower), ("scan", scanning))
    }
    return {
        "tower_per_s": rate["tower"],
        "scan_per_s": rate["scan"],
        "tower_cpu_ms": 1000 * median(t[1] for t in tower) / pictures,
        "scan_cpu_ms": 1000 * median(t[1] for t in scanning) / pictures,
        "ratio": median(cpu),
        "wall_ratio": median(wall),
        "ratios": [round(r, 3) for r in cpu],
    }


def _settings(tower: Backbone, pictures: int, batch: int, workers: int) -> dict[str, Any]:
    return {
        "backbone": tower.name,
        "pictures": pictures,
        "batch": batch,
        "workers": workers,
        "threads": torch.get_num_threads(),
    }


def _write(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write seeded pictures of smooth noise."""
    rng = numpy_rng(0, "bench scan")
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg")
