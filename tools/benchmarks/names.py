"""Very many class names: their text features, and a training step of CoOp over all of them, in bounded memory."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import torch
from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks._step import learned, take_step
from benchmarks.measure import Measured, measure
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import Learner, create_learner

__all__ = ["bench_names"]

log = logging.getLogger("benchmarks")


@BENCHMARKS.register(
    "names", summary="text features and a CoOp step of very many class names: time and memory"
)
def bench_names(
    *,
    backbone: str = "ViT-B-16",
    classes: Annotated[int, Field(ge=2)] = 21000,
    context: Annotated[int, Field(ge=1)] = 16,
    batch: Annotated[int, Field(ge=1)] = 32,
    repeats: Annotated[int, Field(ge=1)] = 1,
) -> dict[str, Any]:
    """Measure with random weights, without a run before the counted ones; there is no baseline, which would not fit.

    ``update_norm`` shows that the step learned something.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: C; above 1,000 the names of ImageNet-21K's synsets are taken.
        context: M learned vectors, shared by all classes.
        batch: Images per step; their embeddings are stored.
        repeats: Counted runs of each.
    """
    tower = create_backbone(backbone)
    names = imagenet_names(classes)
    features = _logged(
        measure(lambda: tower.class_weights(names, ["a photo of a {}."]), repeats, warmup=0), "features"
    )

    learners: list[Learner] = []
    built = _logged(
        measure(
            lambda: learners.append(create_learner("coop", tower, names, context_length=context)), 1, warmup=0
        ),
        "learner",
    )
    learner = learners[0]
    generator = torch_rng(0, "bench names")
    batch_of = {
        "embedding": torch.randn(batch, tower.dim, generator=generator),
        "label": torch.randint(classes, (batch,), generator=generator),
    }
    start = learned(learner)
    step = _logged(measure(lambda: take_step(learner, batch_of, start), repeats, warmup=0), "step")
    update = sum(float((p - start[n]).norm()) for n, p in learned(learner).items())

    rows = {"features": vars(features), "learner": vars(built), "step": vars(step)}
    facts = {"backbone": backbone, "classes": classes, "context": context, "batch": batch}
    return {**facts, "threads": torch.get_num_threads(), **rows, "update_norm": update}


def _logged(measured: Measured, what: str) -> Measured:
    log.info("%s: %.1f s, at most %.2f GiB", what, measured.seconds, measured.peak_rss_gib or float("nan"))
    return measured
