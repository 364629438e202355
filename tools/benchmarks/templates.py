"""Scoring of many templates at once against a loop over single ones."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks.measure import Work, in_turns
from benchmarks.text import imagenet_names
from vlprompt.backbones import create_backbone
from vlprompt.core.seeding import torch_rng
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.phrases import PHRASES

__all__ = ["bench_templates"]


@BENCHMARKS.register("templates", summary="scores of many templates at once, against a loop over sentences")
def bench_templates(
    *,
    backbone: str = "tiny",
    templates: Annotated[int, Field(ge=1)] = 64,
    classes: Annotated[int, Field(ge=2)] = 20,
    images: Annotated[int, Field(ge=1)] = 320,
    repeats: Annotated[int, Field(ge=1)] = 3,
) -> dict[str, Any]:
    """Measure on random image embeddings, in turns, with the time of this process beside that of the clock.

    Args:
        backbone: Any open_clip architecture, or tiny.
        templates: K.
        classes: C, with the first names of ImageNet.
        images: Labelled embeddings.
        repeats: Counted rounds of both ways.
    """
    tower = create_backbone(backbone)
    names = imagenet_names(classes)
    sentences = _sentences(templates)
    embeddings = torch.randn(images, tower.dim, generator=torch_rng(0, "bench templates"))
    labels = torch.arange(images) % classes

    def together() -> list[float]:
        scorer = EmbeddingScorer(tower, names, embeddings, labels)
        return [score.cross_entropy for score in scorer.score(sentences)]

    def one_by_one() -> list[float]:
        features = F.normalize(embeddings, dim=-1)
        losses = []
        for sentence in sentences:
            weights = torch.cat([tower.encode_text([sentence.format(name)]) for name in names])
            losses.append(float(F.cross_entropy(tower.logit_scale * features @ weights.T, labels)))
        return losses

    largest = max(abs(a - b) for a, b in zip(together(), one_by_one(), strict=True))
    ways: dict[str, Work] = {"together": together, "one_by_one": one_by_one}
    turns = in_turns(ways, repeats, warmup=0)
    return {
        "backbone": backbone,
        "templates": templates,
        "classes": classes,
        "images": images,
        "threads": torch.get_num_threads(),
        "together_s": turns["together"].seconds,
        "together_cpu_s": turns["together"].cpu_seconds,
        "one_by_one_s": turns["one_by_one"].seconds,
        "speedup": turns.ratio("one_by_one", "together"),
        "cpu_speedup": turns.cpu_ratio("one_by_one", "together"),
        "quiet": turns.quiet,
        "largest_difference": largest,
    }


def _sentences(count: int) -> list[str]:
    """Return so many distinct templates of the grammar's phrases."""
    media = [medium for medium in PHRASES["medium"] if medium]
    adjectives = [adjective for adjective in PHRASES["adjective"] if adjective]
    places = ["", *(f" {place}" for place in PHRASES["place"] if place)]
    whole = [f"a {a} {m} of a {{}}{p}." for p in places for a in adjectives for m in media]
    return whole[:count]
