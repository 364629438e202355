"""Scanning a folder for triggers against running the image tower on ready tensors: what looking for triggers costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
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


@BENCHMARKS.register("scan", summary="scanning files for triggers, against the image tower alone")
def bench_scan(
    *, backbone: str = "ViT-B-16", pictures: int = 64, batch: int = 16, workers: int = 2, repeats: int = 3
) -> dict[str, Any]:
    """Compare pictures per second; decoding, preprocessing, judging and the table are part of scanning.

    The tower gets the same pictures, decoded and preprocessed beforehand. ``ratio`` is of processor time (all threads),
    ``wall_ratio`` of the clock; both are at most 1 but for noise, since scanning runs the same tower. The sentences of
    triggers and objects are encoded before the clock starts: once per scan, however many pictures there are.

    Args:
        backbone: Any open_clip architecture, or tiny.
        pictures: Files that are scanned; JPEG, as large as the tower's input.
        batch: Pictures per pass.
        workers: Threads that decode.
        repeats: Counted runs of each, taken in turn; the fastest counts.
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

        times: dict[str, list[tuple[float, float]]] = {"tower": [], "scan": []}
        run_tower()
        run_scan()
        for _ in range(max(1, repeats)):
            for name, work in (("tower", run_tower), ("scan", run_scan)):
                started, cpu = time.perf_counter(), time.process_time()
                work()
                times[name].append((time.perf_counter() - started, time.process_time() - cpu))
    best = {name: tuple(min(t[i] for t in found) for i in range(2)) for name, found in times.items()}
    return {
        **_settings(tower, pictures, batch, workers),
        "tower_per_s": pictures / best["tower"][0],
        "scan_per_s": pictures / best["scan"][0],
        "tower_cpu_ms": 1000 * best["tower"][1] / pictures,
        "scan_cpu_ms": 1000 * best["scan"][1] / pictures,
        "ratio": best["tower"][1] / best["scan"][1],
        "wall_ratio": best["tower"][0] / best["scan"][0],
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
