"""Scanning a folder for triggers against running the image tower on ready tensors: what looking for triggers costs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import BENCHMARKS
from benchmarks.measure import Measured, in_turns
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.seeding import numpy_rng
from vlprompt.learners import create_learner
from vlprompt.security.scan import scan

__all__ = ["bench_scan"]


@BENCHMARKS.register("scan", summary="scanning files for triggers, against the image tower alone")
def bench_scan(
    *, backbone: str = "ViT-B-16", images: int = 64, batch: int = 16, workers: int = 2, repeats: int = 5
) -> dict[str, Any]:
    """Compare images per second; decoding, preprocessing, judging and the table are part of scanning.

    The tower gets the same images, decoded and preprocessed beforehand. ``ratio`` is of processor time (all
    threads), ``wall_ratio`` of the clock; both are at most 1 but for noise, since scanning runs the same tower. Each is
    the median over pairs of runs, now the tower first and now the scan, so that a machine whose speed drifts takes as
    much as it gives. The sentences of triggers and objects are encoded before the clock starts: once per scan, however
    many images there are.

    Args:
        backbone: Any open_clip architecture, or tiny.
        images: Files that are scanned; JPEG, as large as the tower's input.
        batch: Images per pass.
        workers: Threads that decode.
        repeats: Counted pairs of runs.
    """
    tower = create_backbone(backbone)
    scanner = create_learner("dbom", tower, [f"object {i}" for i in range(10)]).eval()
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), images, tower.image_size)
        pixels = [tower.preprocess(Image.open(p).convert("RGB")) for p in sorted(Path(folder).iterdir())]
        batches = torch.stack(pixels).split(batch)

        def run_tower() -> None:
            for part in batches:
                tower.image_embeddings(part)

        def run_scan() -> None:
            scan(folder, scanner, batch_size=batch, workers=workers)

        work = {"tower": run_tower, "scan": run_scan}
        turns = in_turns(work, repeats)
    return {
        **_settings(tower, images, batch, workers),
        **_figures(images, turns.runs["tower"], turns.runs["scan"]),
        "quiet": turns.quiet,
    }


def _figures(images: int, tower: list[Measured], scanning: list[Measured]) -> dict[str, Any]:
    """Return medians, and the ratio of every pair of runs."""
    pairs = list(zip(tower, scanning, strict=True))
    ratios = [t.cpu_seconds / s.cpu_seconds for t, s in pairs]
    return {
        "tower_per_s": images / median(t.seconds for t in tower),
        "scan_per_s": images / median(s.seconds for s in scanning),
        "tower_cpu_ms": 1000 * median(t.cpu_seconds for t in tower) / images,
        "scan_cpu_ms": 1000 * median(s.cpu_seconds for s in scanning) / images,
        "ratio": median(ratios),
        "wall_ratio": median(t.seconds / s.seconds for t, s in pairs),
        "ratios": [round(r, 3) for r in ratios],
    }


def _settings(tower: Backbone, images: int, batch: int, workers: int) -> dict[str, Any]:
    return {
        "backbone": tower.name,
        "images": images,
        "batch": batch,
        "workers": workers,
        "threads": torch.get_num_threads(),
    }


def _write(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write seeded images of smooth noise."""
    rng = numpy_rng(0, "bench scan")
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg")
