"""Evaluating and scanning files with loading workers, against the ways before: no thread, and one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks._photographs import photographs, threaded
from benchmarks.measure import in_turns
from vlprompt.backbones import create_backbone
from vlprompt.classification.evaluate import ImageReader, predict_logits
from vlprompt.data.loading import using_workers
from vlprompt.learners import create_learner
from vlprompt.security.scan import scan

__all__ = ["bench_evaluate"]


@BENCHMARKS.register("evaluate", summary="scoring a learner on files: loading workers against none")
def bench_evaluate(
    *,
    backbone: str = "tiny",
    images: int = 512,
    batch: int = 64,
    workers: int = 2,
    device: str = "cpu",
    repeats: int = 3,
) -> dict[str, Any]:
    """Compare images per second of whole evaluations and scans.

    With a small tower, reading is what the time goes to, as with a large one on a GPU. ``evaluate_ratio`` is against
    reading in the process itself, which is how it was done for learners that touch the image tower; ``scan_ratio`` is
    against reading by a single thread ahead of the tower. Both are medians over pairs of runs that take turns; workers
    start and end inside the clock.

    Args:
        backbone: Any open_clip architecture, or tiny.
        images: JPEGs of 500 x 375 pixels, drawn for the benchmark.
        batch: Images per pass.
        workers: Loading processes.
        device: cpu, cuda or mps.
        repeats: Counted pairs of runs.
    """
    tower = create_backbone(backbone)
    learner = create_learner("vpt", tower, ["a", "b"]).to(device).eval()
    scanner = create_learner("dbom", tower, [f"object {i}" for i in range(10)]).to(device).eval()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        data = photographs(Path(folder), images)

        def evaluate(count: int) -> None:
            with using_workers(count):
                predict_logits(learner, data, batch_size=batch)

        def scan_by_thread() -> None:
            reader = ImageReader(data, scanner.preprocess)
            items = [range(images)[start : start + batch] for start in range(0, images, batch)]
            for pixels in threaded(reader, items):
                scanner.judge(scanner.embed_images(pixels.to(device)))  # type: ignore[operator]  # a module's attribute

        works = {
            "evaluate/0": lambda: evaluate(0),
            f"evaluate/{workers}": lambda: evaluate(workers),
            "scan/thread": scan_by_thread,
            f"scan/{workers}": lambda: scan(folder, scanner, batch_size=batch, workers=workers),
        }
        turns = in_turns(works, repeats)

    return {
        "backbone": tower.name,
        "device": device,
        "images": images,
        "threads": torch.get_num_threads(),
        **{f"{name}_per_s": images / turns[name].seconds for name in works},
        "evaluate_ratio": turns.ratio("evaluate/0", f"evaluate/{workers}"),
        "scan_ratio": turns.ratio("scan/thread", f"scan/{workers}"),
        "quiet": turns.quiet,
    }
