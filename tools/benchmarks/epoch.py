"""An epoch of few-shot CoOp on cached embeddings against one that runs both towers as the reference code does."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import BENCHMARKS
from vlprompt.backbones import create_backbone
from vlprompt.classification.fit import fit, parse_options
from vlprompt.classification.sources import ImageBatches
from vlprompt.data import Augmentation, load_dataset
from vlprompt.learners import create_learner
from vlprompt.training.callbacks import Callback

__all__ = ["EpochClock", "bench_epoch"]


class EpochClock(Callback):
    """Seconds of every epoch, in order, in :attr:`seconds`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_start(self, trainer: Any) -> None:
        """See :meth:`Callback.on_start`."""
        self._last = time.perf_counter()

    def on_epoch(self, trainer: Any, record: dict[str, Any]) -> None:
        """See :meth:`Callback.on_epoch`."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


@BENCHMARKS.register("epoch", summary="an epoch of CoOp after the first: cached embeddings, fast text")
def bench_epoch(
    *,
    backbone: str = "ViT-B-16",
    classes: int = 10,
    shots: int = 16,
    batch: int = 32,
    context: int = 16,
    epochs: int = 4,
) -> dict[str, Any]:
    """Time CoOp's epochs on drawn scenes with random weights.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: Of scenes/shape.
        shots: Images per class.
        batch: Samples per step.
        context: M learned vectors.
        epochs: Epochs of the fast run; the first encodes the images, the median of the others counts.
    """
    tower = create_backbone(backbone)
    data = load_dataset("scenes/shape", shots=shots).keep_classes(range(classes))
    options: dict[str, Any] = {"epochs": epochs, "batch_size": batch, "drop_last": False}
    learner: Any = create_learner("coop", tower, data.classnames, context_length=context)

    clock = EpochClock()
    started = time.perf_counter()
    fit(learner, data, callbacks=[clock], **options)
    total = time.perf_counter() - started

    source = ImageBatches(data, tower.preprocess, Augmentation(), parse_options(options), views=1)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.002, momentum=0.9)
    started = time.perf_counter()

    for indices in source.plan(0):
        pixels = source.fetch(indices, 0)
        text = tower.text.encode_plain(learner.layout, learner.context, length=tower.text.context_length)
        images = tower.encode_image(pixels["image"])
        logits = tower.logit_scale * images @ F.normalize(text, dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(logits, pixels["label"]).backward()
        optimizer.step()

    naive = time.perf_counter() - started
    fast = sorted(clock.seconds[1:])[len(clock.seconds[1:]) // 2]
    return {
        "backbone": backbone,
        "classes": classes,
        "shots": shots,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "naive_epoch_s": naive,
        "fast_epoch_s": fast,
        "fast_first_epoch_and_encoding_s": total - sum(clock.seconds[1:]),
        "speedup": naive / fast,
    }
