"""The image tower in half precision against float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import BENCHMARKS
from benchmarks.measure import in_turns
from vlprompt.backbones import create_backbone
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import torch_rng

__all__ = ["bench_encode"]


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

    turns = in_turns({"full": lambda: run("full", full), "half": lambda: run("half", half)}, repeats)
    cosines = F.cosine_similarity(features["full"], features["half"])
    return {
        "backbone": backbone,
        "batch": batch,
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "seconds": turns["half"].seconds,
        "cpu_seconds": turns["half"].cpu_seconds,
        "over_fp32": turns.ratio("full", "half"),
        "over_fp32_cpu": turns.cpu_ratio("full", "half"),
        "quiet": turns.quiet,
        "images_per_s": batch / turns["half"].seconds,
        "smallest_cosine": float(cosines.min()),
    }
