"""The same work in two precisions, in turns, so that what else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import BENCHMARKS
from vlprompt.backbones import create_backbone
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import torch_rng

__all__ = ["bench_encode", "compare_pairs"]


def compare_pairs(
    full: Callable[[], object], half: Callable[[], object], repeats: int, precision: str
) -> dict[str, Any]:
    """Run both ``repeats`` times in turns, after one run of each that is not counted.

    Returns:
        ``seconds`` and ``cpu_seconds`` of the second (medians), and the medians of the pairs' ratios: how often the
        second is done in the time of the first, by the clock and by the processor's time.
    """
    times: list[tuple[float, float, float, float]] = []
    for _ in range(max(1, repeats) + 1):
        first = _timed(full)
        second = _timed(half)
        times.append((*first, *second))
    counted = times[1:]

    return {
        "precision": precision,
        "seconds": statistics.median(row[2] for row in counted),
        "cpu_seconds": statistics.median(row[3] for row in counted),
        "over_fp32": statistics.median(row[0] / row[2] for row in counted),
        "over_fp32_cpu": statistics.median(row[1] / row[3] for row in counted),
    }


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    started = time.perf_counter()
    cpu_started = time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu_started


@BENCHMARKS.register("encode", summary="the image tower in half precision against float32")
def bench_encode(
    *,
    backbone: str = "ViT-B-16",
    precision: Precision = "bf16",
    batch: int = 16,
    device: str = "cpu",
    repeats: int = 5,
) -> dict[str, Any]:
    """Compare the time of :meth:`Backbone.image_embeddings` and its features on noise.

    Args:
        backbone: Any open_clip architecture with random weights, or an embedded one.
        precision: What is compared with fp32.
        batch: Images at a time.
        device: Where both run.
        repeats: Counted pairs.
    """
    full = create_backbone(backbone, device=device)
    half = create_backbone(backbone, precision=precision, device=device)
    images = torch.randn(batch, 3, *full.image_size, generator=torch_rng(0, "bench encode")).to(device)

    features = {}

    def run(name: str, tower: Any) -> None:
        features[name] = tower.encode_image(images).cpu()  # waits for the device

    ratios = compare_pairs(lambda: run("full", full), lambda: run("half", half), repeats, precision)
    cosines = F.cosine_similarity(features["full"], features["half"])
    return {
        "backbone": backbone,
        "batch": batch,
        "device": device,
        "threads": torch.get_num_threads(),
        **ratios,
        "images_per_s": batch / ratios["seconds"],
        "smallest_cosine": float(cosines.min()),
    }
