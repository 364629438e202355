"""An epoch of a learner that enters the image tower: frozen stem kept, against decoding and running it again."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks.epoch import EpochClock
from benchmarks.machine import NoiseWatch
from vlprompt.backbones import create_backbone
from vlprompt.classification.fit import fit
from vlprompt.data import load_dataset
from vlprompt.learners import create_learner

__all__ = ["bench_prefix"]


@BENCHMARKS.register("prefix", summary="an epoch of a learner in the image tower, with the frozen stem kept")
def bench_prefix(
    *,
    backbone: str = "photo-vit",
    learner: str = "maple",
    classes: int = 10,
    shots: int = 4,
    batch: int = 4,
    epochs: int = 3,
    repeats: int = 2,
) -> dict[str, Any]:
    """Compare epochs after the first of two whole trainings, in turns; both end at the same parameters.

    Args:
        backbone: An embedded backbone, or any open_clip architecture with random weights.
        learner: One that enters the image tower.
        classes: Of scenes/shape.
        shots: Images per class.
        batch: Samples per step.
        epochs: Of a training; the first keeps the stem and doesn't count.
        repeats: Counted rounds.
    """
    tower = create_backbone(backbone)
    data = load_dataset("scenes/shape", shots=shots, size=max(tower.image_size)).keep_classes(range(classes))
    seconds: dict[str, list[float]] = {"kept": [], "again": []}
    ends: dict[str, dict[str, torch.Tensor]] = {}
    watch = NoiseWatch()

    for number in range(repeats):
        for way in ("kept", "again") if number % 2 == 0 else ("again", "kept"):
            trained = create_learner(learner, tower, data.classnames)
            clock = EpochClock()
            fit(
                trained,
                data,
                callbacks=[clock],
                prefix_gib=2.0 if way == "kept" else 0.0,
                epochs=epochs,
                batch_size=batch,
                drop_last=False,
            )
            seconds[way].append(statistics.median(clock.seconds[1:]))
            ends[way] = trained.trainable_state()

    noise = watch.noise()
    ratios = [again / kept for again, kept in zip(seconds["again"], seconds["kept"], strict=True)]
    difference = max(float((t - ends["again"][n]).abs().max()) for n, t in ends["kept"].items())
    return {
        "backbone": backbone,
        "learner": learner,
        "images": len(data),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "kept_epoch_s": statistics.median(seconds["kept"]),
        "again_epoch_s": statistics.median(seconds["again"]),
        "speedup": statistics.median(ratios),
        "max_abs_diff": difference,
        "quiet": noise is None or noise.quiet,
    }
