"""Images per second of the offline backbones for photographs, beside timm's network as it comes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks.measure import in_turns
from vlprompt.backbones import create_backbone
from vlprompt.backbones.lite0 import load_lite0
from vlprompt.core.seeding import torch_rng

__all__ = ["bench_photo"]


@BENCHMARKS.register(
    "photo", summary="images per second of photo or photo-vit, against timm's network as it comes"
)
def bench_photo(
    *, backbone: str = "photo", pretrained: str = "", batch: int = 16, threads: int = 2, repeats: int = 5
) -> dict[str, Any]:
    """Measure :meth:`Backbone.encode_image` at the backbone's own size.

    Args:
        backbone: ``photo`` or ``photo-vit``.
        pretrained: ``random`` for random weights in the towers of our own; speed does not depend on it.
        batch: Images at a time.
        threads: Threads of the processor.
        repeats: Counted pairs of runs; medians are reported.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    try:
        tower = create_backbone(backbone, pretrained or None)
        images = torch.randn(batch, 3, *tower.image_size, generator=torch_rng(0, "bench photo"))
        network = load_lite0()

        with torch.no_grad():
            both = in_turns(
                {"ours": lambda: tower.encode_image(images), "plain": lambda: network(images)}, repeats
            )
    finally:
        torch.set_num_threads(before)

    return {
        "backbone": backbone,
        "pixels": tower.image_size[0],
        "batch": batch,
        "threads": threads,
        "ours": vars(both["ours"]),
        "network_alone": vars(both["plain"]),
        "images_per_s": batch / both["ours"].seconds,
        "images_per_cpu_s": batch / both["ours"].cpu_seconds,
        "ratio": both.cpu_ratio("plain", "ours"),
    }
