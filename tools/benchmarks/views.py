"""All views of one image made ready for the image tower: cut from one tensor, against one by one with Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import BENCHMARKS
from benchmarks._photographs import WIDTH_HEIGHT
from benchmarks.measure import in_turns
from vlprompt.adaptation.views import ViewPlan, open_images
from vlprompt.backbones import create_backbone
from vlprompt.core.seeding import numpy_rng

__all__ = ["bench_views"]


@BENCHMARKS.register("views", summary="64 views of one image made ready, against Pillow one by one")
def bench_views(
    *, backbone: str = "ViT-B-16", views: int = 64, images: int = 4, threads: int = 1, repeats: int = 5
) -> dict[str, Any]:
    """Compare the two ways of making the same crops and flips.

    Args:
        backbone: Its input's size and preprocessing count.
        views: V of each image.
        images: Of 500 x 375 pixels.
        threads: Of torch.
        repeats: Counted pairs of runs.
    """
    torch.set_num_threads(threads)
    tower = create_backbone(backbone)
    rng = numpy_rng(0, "bench views")
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)) for _ in range(images)]
    opened = open_images([one.resize(WIDTH_HEIGHT, Image.Resampling.BICUBIC) for one in coarse], tower)
    plans = {"pillow": ViewPlan(views, "crop_flip_pil"), "tensor": ViewPlan(views, "crop_flip")}

    def make(plan: ViewPlan) -> None:
        for image in opened:
            plan.make(image, tower)

    works = {name: (lambda plan=plan: make(plan)) for name, plan in plans.items()}
    turns = in_turns(works, repeats)
    made = [plan.make(opened[0], tower) for plan in plans.values()]
    return {
        "backbone": tower.name,
        "views": views,
        "threads": threads,
        **{f"{name}_ms": 1000 * turns[name].seconds / images for name in works},
        "speedup": turns.ratio("pillow", "tensor"),
        "quiet": turns.quiet,
        "mean_difference": float((made[0] - made[1]).abs().mean()),
    }
