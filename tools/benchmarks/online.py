"""Methods on features: images per second on cached features, and the memory that a whole data set takes."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import BENCHMARKS
from vlprompt.adaptation import create_adapter
from vlprompt.adaptation._features import FeatureAdapter
from vlprompt.adaptation.base import EncodedViews
from vlprompt.backbones import create_backbone
from vlprompt.core.errors import VLPromptError

__all__ = ["bench_online"]

_TOGETHER = 16  # images that come in one portion, as in a stream


@BENCHMARKS.register("online", summary="images per second of a method on cached features")
def bench_online(
    *, method: str = "bca", classes: int = 100, dim: int = 512, views: int = 1, images: int = 2000
) -> dict[str, Any]:
    """Adapt to seeded features that lie around seeded class weights; nothing is encoded.

    Args:
        method: One that works on features.
        classes: C.
        dim: d.
        views: V of every image.
        images: Of the stream; all of them together for methods that see a whole data set.
    """
    backbone = create_backbone("tiny", pretrained="random")
    adapter = create_adapter(method, backbone, [f"class {number}" for number in range(classes)], views=views)
    if not isinstance(adapter, FeatureAdapter):
        raise VLPromptError(f"{method} does not work on features alone.")

    generator = torch.Generator().manual_seed(0)
    adapter.weights = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    adapter.scale = 100.0
    if method == "ecalp":
        adapter.emphasis = F.normalize(adapter.weights.var(0), dim=0)  # type: ignore[attr-defined]
    adapter.reset()

    labels = torch.arange(images) % classes
    features = torch.randn(images, views, dim, generator=generator) / dim**0.5
    features += 0.3 * adapter.weights[labels][:, None]
    portion = images if adapter.granularity == "dataset" else _TOGETHER

    started = time.perf_counter()
    processor = time.process_time()
    for part in features.split(portion):
        adapter.adapt(EncodedViews(part, 0, (), torch.zeros(len(part), 2)))
    return {
        "method": method,
        "images_per_second": images / (time.perf_counter() - started),
        "images_per_processor_second": images / (time.process_time() - processor),
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in adapter.state().values()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
