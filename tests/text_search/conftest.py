"""Scorers of tests: one that knows what a good sentence is, and one on a small random backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from vlprompt.backbones import Backbone
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.scorer import Score, Scorer

CLASSES = ("dog", "red circle", "hummingbird", "boeing 737-800")


class ToyScorer(Scorer):
    """The cross-entropy falls by what each word is worth."""

    def __init__(self, worth: dict[str, float]) -> None:
        self.identity = f"toy {sorted(worth.items())}"
        self.worth = worth
        self.seen: list[str] = []

    def score(self, templates: Sequence[str]) -> list[Score]:
        self.seen += templates
        self.scored += len(templates)
        return [self._one(template) for template in templates]

    def _one(self, template: str) -> Score:
        value = sum(worth for phrase, worth in self.worth.items() if phrase in template)
        return Score(
            accuracy=min(1.0, max(0.0, value / 10)), cross_entropy=10 - value, gap=0.0, tokens=len(template)
        )


@pytest.fixture
def make_toy() -> Callable[[dict[str, float]], ToyScorer]:
    return ToyScorer


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of length other than one, and labels that leave a class without samples."""
    generator = torch.Generator().manual_seed(5)
    return 3 * torch.randn(30, 48, generator=generator), torch.randint(3, (30,), generator=generator)


@pytest.fixture
def scorer(backbone: Backbone, samples: tuple[torch.Tensor, torch.Tensor]) -> EmbeddingScorer:
    return EmbeddingScorer(backbone, CLASSES, *samples)
