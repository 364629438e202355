"""Scores of templates against zero-shot classification by hand, and what is never computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.text_search.conftest import CLASSES, ToyScorer
from vlprompt import create_learner, evaluate, load_dataset
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.classification.evaluate import image_embeddings
from vlprompt.core.errors import DataError
from vlprompt.text_search.choice import occlusion
from vlprompt.text_search.embeddings import EmbeddingScorer

TEMPLATES = ("a photo of a {}.", "{}.", "a blurry drawing of the {} on a white background.")


def test_a_score_is_what_zero_shot_classification_reaches() -> None:
    tiny = create_backbone("tiny")
    data = load_dataset("scenes/pattern@sketch", "val", shots=2, seed=1)
    learner = create_learner("zero_shot", tiny, data.classnames, [TEMPLATES[2]])
    scorer = EmbeddingScorer(
        tiny, data.classnames, image_embeddings(learner, data), torch.tensor(data.labels)
    )

    (score,) = scorer.score([TEMPLATES[2]])
    measured = evaluate(learner, data)
    assert score.accuracy == pytest.approx(measured["accuracy"], abs=1e-6)
    assert score.cross_entropy == pytest.approx(measured["nll"], abs=1e-5)

    together = scorer.score_together(data.templates)
    several = evaluate(create_learner("zero_shot", tiny, data.classnames, data.templates), data)
    assert together.accuracy == pytest.approx(several["accuracy"], abs=1e-6)
    assert together.cross_entropy == pytest.approx(several["nll"], abs=1e-5)


def test_every_figure_equals_a_loop_over_samples(
    backbone: Backbone, scorer: EmbeddingScorer, samples: tuple[Tensor, Tensor]
) -> None:
    embeddings, labels = samples
    for template, score in zip(TEMPLATES, scorer.score(TEMPLATES), strict=True):
        weights = torch.cat([backbone.encode_text([template.format(name)]) for name in CLASSES])
        entropy = gap = hits = 0.0
        wrong: dict[tuple[int, int], int] = {}
        right = [0] * len(CLASSES)
        for row, label in zip(embeddings, labels.tolist(), strict=True):
            p = (backbone.logit_scale * F.normalize(row, dim=0) @ weights.T).softmax(0)
            entropy -= float(p[label].log())
            gap += float(p[label] - max(p[c] for c in range(len(CLASSES)) if c != label))
            answer = int(p.argmax())
            hits += answer == label
            right[label] += answer == label
            if answer != label:
                wrong[label, answer] = wrong.get((label, answer), 0) + 1

        sizes = [labels.tolist().count(c) for c in range(len(CLASSES))]
        assert score.accuracy == pytest.approx(hits / 30)
        assert score.cross_entropy == pytest.approx(entropy / 30, abs=1e-5)
        assert score.gap == pytest.approx(gap / 30, abs=1e-5)
        assert score.recalls == pytest.approx([r / n if n else -1 for r, n in zip(right, sizes, strict=True)])
        shares = {pair: round(count / sizes[pair[0]], 4) for pair, count in wrong.items()}
        assert {(a, b): s for a, b, s in score.confusions}.items() <= shares.items()
        assert score.confusions[0][2] == max(shares.values())


def test_many_at_once_score_as_one_by_one(
    backbone: Backbone, scorer: EmbeddingScorer, samples: tuple[Tensor, Tensor]
) -> None:
    single = [EmbeddingScorer(backbone, CLASSES, *samples).score([t])[0] for t in TEMPLATES]
    for one, other in zip(scorer.score(TEMPLATES), single, strict=True):
        assert one.accuracy == other.accuracy
        assert one.cross_entropy == pytest.approx(other.cross_entropy, abs=1e-5)


def test_a_new_score_needs_no_image_tower(
    backbone: Backbone, samples: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(backbone.vision, "encode", lambda *a, **k: calls.append("image"))
    scorer = EmbeddingScorer(backbone, CLASSES, *samples)
    scorer.score(TEMPLATES)
    scorer.probabilities(TEMPLATES)
    scorer.score_together(TEMPLATES)
    assert (scorer.scored, calls) == (3, [])


def test_a_remembered_score_needs_no_text_tower(
    backbone: Backbone,
    samples: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = EmbeddingScorer(backbone, CLASSES, *samples, memo=tmp_path)
    scores = first.score([*TEMPLATES, TEMPLATES[0]])
    assert first.scored == 3

    calls: list[str] = []
    monkeypatch.setattr(backbone.vision, "encode", lambda *a, **k: calls.append("image"))
    monkeypatch.setattr(backbone.text, "encode_strings", lambda *a, **k: calls.append("text"))
    with (tmp_path / f"{first.identity}.jsonl").open("a") as file:
        file.write('{"template": "a pho')  # a kill in the middle of a line
    again = EmbeddingScorer(backbone, CLASSES, *samples, memo=tmp_path)
    assert again.score([*TEMPLATES, TEMPLATES[0]]) == scores
    assert (again.scored, calls) == (0, [])


@pytest.mark.parametrize("change", ["labels", "embeddings", "names"])
def test_identity_follows_all_that_a_score_depends_on(
    change: str, backbone: Backbone, scorer: EmbeddingScorer, samples: tuple[Tensor, Tensor]
) -> None:
    embeddings, labels = samples
    names = CLASSES
    if change == "labels":
        labels = labels.flip(0)
    elif change == "embeddings":
        embeddings = embeddings + 0.01 * torch.randn(embeddings.shape)
    else:
        names = (*CLASSES[:3], "airbus")
    assert EmbeddingScorer(backbone, names, embeddings, labels).identity != scorer.identity
    assert EmbeddingScorer(backbone, CLASSES, *samples).identity == scorer.identity


def test_a_race_keeps_the_better_half(backbone: Backbone, samples: tuple[Tensor, Tensor]) -> None:
    racing = EmbeddingScorer(backbone, CLASSES, *samples, race_classes=3)
    kept = racing.shortlist(TEMPLATES, "cross_entropy")
    assert len(kept) == 2
    assert kept == [template for template in TEMPLATES if template in kept]
    everything = EmbeddingScorer(backbone, CLASSES, *samples, race_classes=4)
    assert everything.shortlist(TEMPLATES, "cross_entropy") == list(TEMPLATES)


def test_occlusion_equals_brute_force(scorer: EmbeddingScorer) -> None:
    template = "a big photo of the {} there."
    parts = occlusion(scorer, template, "cross_entropy")
    shorter = [
        "big photo of the {} there.",
        "a photo of the {} there.",
        "a big of the {} there.",
        "a big photo the {} there.",
        "a big photo of {} there.",
        "a big photo of the {}",
    ]
    assert [part.template for part in parts] == shorter
    assert [part.word for part in parts] == ["a", "big", "photo", "of", "the", "there."]
    whole = scorer.score([template])[0].cross_entropy
    for part in parts:
        assert part.loss == pytest.approx(scorer.score([part.template])[0].cross_entropy - whole, abs=2e-6)


def test_occlusion_finds_the_word_that_counts() -> None:
    parts = occlusion(ToyScorer({"blue": 3.0, "old": -1.0}), "an old blue {}.", "cross_entropy")
    assert {part.word: part.loss for part in parts} == {"an": 0.0, "old": -1.0, "blue": 3.0}


def test_no_samples_are_refused(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="there are none"):
        EmbeddingScorer(backbone, CLASSES, torch.zeros(0, 48), torch.zeros(0))
