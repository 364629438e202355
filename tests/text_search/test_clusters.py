"""Words that are clustered, pruned and searched: against SciPy, exhaustive search, mistakes of the published code."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from tests.text_search.conftest import CLASSES, ToyScorer
from vlprompt.backbones import Backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.loop import Outcome, Settings, search
from vlprompt.text_search.proposers.clusters import Clusters, crossed
from vlprompt.text_search.templates import Rules
from vlprompt.text_search.units import cluster_representatives, influence, plain_words, pruned

UNITS = ["alpha", "bravo", "crimson", "delta", "echo", "foxtrot"]
WORTH = {"alpha": 0.5, "bravo": -1.0, "crimson": 2.0, "delta": 0.25, "echo": -0.5, "foxtrot": 1.0}


class Additive(ToyScorer):
    """Words have a worth each, however often they stand there; every class has text features."""

    def _one(self, template: str):  # type: ignore[no-untyped-def]
        words = template.replace(".", "").split()
        value = sum(WORTH.get(word, 0.0) for word in words)
        return (
            ToyScorer({"": value})._one(template) if value >= 0 else ToyScorer({"{}": value})._one(template)
        )


def _ready(**options: object) -> Clusters:
    proposer = Clusters(**options)  # type: ignore[arg-type]
    proposer.units = list(UNITS)
    proposer.prepare = lambda *_: None  # type: ignore[method-assign] - the units are given
    return proposer


def _run(backbone: Backbone, proposer: Clusters, steps: int = 99, seed: int = 1) -> tuple[Outcome, Additive]:
    scorer = Additive(WORTH)
    settings = Settings(steps=steps, proposals=6, patience=99, seed=seed)
    outcome, _ = search(scorer, proposer, Rules(backbone, CLASSES), ["{}."], settings)
    return outcome, scorer


def test_influence_is_scipys_divergence(scorer: EmbeddingScorer) -> None:
    templates = ["big {}.", "old photo {}."]
    values = influence(scorer, templates)
    empty = scorer.probabilities(["{}."])[0].double().numpy()
    for template, value in zip(templates, values, strict=True):
        present = scorer.probabilities([template])[0].double().numpy()
        assert float(value) == pytest.approx(rel_entr(present, empty).sum(-1).mean(), rel=1e-5)
    assert float(influence(scorer, ["{}."])[0]) == pytest.approx(0, abs=1e-9)


def test_representatives_are_unique_and_near_their_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(5, 8, generator=generator)
    points = centres.repeat_interleave(6, 0) + 0.1 * torch.randn(30, 8, generator=generator)
    rows = cluster_representatives(points, 5, seed=1)
    assert len(set(rows)) == 5
    assert sorted(row // 6 for row in rows) == [0, 1, 2, 3, 4]
    assert rows == cluster_representatives(points, 5, seed=1)
    same = torch.ones(9, 4)
    assert len(set(cluster_representatives(same + 1e-6 * torch.randn(9, 4, generator=generator), 6, 1))) == 6
    assert cluster_representatives(points, 40, 1) == list(range(30))


def test_pruning_keeps_what_is_strictly_above_and_never_nothing() -> None:
    values = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.5])
    assert pruned(values, 50) == [4, 1]
    assert pruned(values, 0) == [4, 1, 2, 3]
    assert pruned(values, 100) == [4]
    assert pruned(torch.ones(3), 10) == [0]


def test_words_name_no_class_and_are_no_little_words() -> None:
    vocabulary = ["the", "a", "photo", "Dog", "dog", "red", "caf\u00e9", "x1", "sketch", "blurry"]
    assert plain_words(vocabulary, CLASSES, 9) == ["photo", "Dog", "sketch", "blurry"]
    assert plain_words(vocabulary, CLASSES, 1) == ["photo"]


@pytest.mark.parametrize("site", ["before", "behind", "both"])
def test_greedy_is_exhaustive_where_words_add_up(site: str, backbone: Backbone) -> None:
    outcome, scorer = _run(backbone, _ready(length=2, site=site))
    everything = [f"{' '.join(pair)} {{}}." for size in (0, 1, 2) for pair in product(UNITS, repeat=size)]
    best = min(score.cross_entropy for score in scorer.score(everything))
    assert outcome.candidates[0].score.cross_entropy == pytest.approx(best)
    assert outcome.stopped == "the proposer has nothing left"
    sides = 2 if site == "both" else 1
    assert len(outcome.candidates) == 1 + 2 * sides * len(UNITS)


def test_genetic_search_keeps_the_best_of_all_that_was_scored(backbone: Backbone) -> None:
    outcome, scorer = _run(backbone, _ready(algorithm="genetic", length=3, population=20), steps=14)
    assert scorer.scored == len(outcome.candidates) == len(set(scorer.seen)) <= 1 + 14 * 6
    scores = scorer.score(list(dict.fromkeys(scorer.seen)))
    assert outcome.candidates[0].score.cross_entropy == min(score.cross_entropy for score in scores)
    assert outcome.candidates[0].template.count("crimson") >= 2


def test_a_child_has_words_of_both_parents() -> None:
    rng = np.random.default_rng(0)
    first, second = ("a", "b", "c", "d"), ("w", "x", "y", "z")
    for _ in range(50):
        child = crossed(first, second, rng)
        assert set(child) & set(first)
        assert set(child) & set(second)
        assert all(word in (first[i], second[i]) for i, word in enumerate(child))


def test_mutation_reaches_every_place_and_changes_a_tenth() -> None:
    proposer = _ready(length=10)
    rng = np.random.default_rng(0)
    words = tuple(["none"] * 10)
    changed = [
        tuple(i for i, word in enumerate(proposer.mutated(words, rng)) if word != "none") for _ in range(200)
    ]
    assert {len(places) for places in changed} == {1}
    assert {places[0] for places in changed} == set(range(10))


@pytest.mark.parametrize("algorithm", ["greedy", "genetic"])
def test_the_same_seed_gives_the_same_result(algorithm: str, backbone: Backbone) -> None:
    runs = [_run(backbone, _ready(algorithm=algorithm, population=8), steps=5, seed=s)[0] for s in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert (runs[0] == runs[2]) == (algorithm == "greedy")  # which draws nothing


def test_words_of_a_real_tokenizer_are_found(scorer: EmbeddingScorer, backbone: Backbone) -> None:
    proposer = Clusters(vocabulary=60, clusters=12, percentile=50)
    proposer.prepare(scorer, CLASSES, 1)
    assert 1 <= len(proposer.units) <= 6
    assert len(set(proposer.units)) == len(proposer.units)
    tokenizer = backbone.text.require_tokenizer()
    assert all(len(tokenizer.encode(unit)) == 1 for unit in proposer.units)
    again = Clusters(vocabulary=60, clusters=12, percentile=50)
    again.prepare(scorer, CLASSES, 1)
    assert again.units == proposer.units

    readable = Clusters(source="phrases", clusters=12, percentile=50)
    readable.prepare(scorer, CLASSES, 1)
    assert 1 <= len(readable.units) <= 6
    with pytest.raises(VLPromptError, match="no text features"):
        Clusters(source="phrases").prepare(ToyScorer({}), CLASSES, 1)


@pytest.mark.parametrize("site", ["before", "behind", "both"])
def test_influence_is_measured_where_the_words_will_stand(site: str, scorer: EmbeddingScorer) -> None:
    """Half of twelve words lie strictly above the median: none is judged by a sentence without it."""
    proposer = Clusters(vocabulary=60, clusters=12, percentile=50, site=site)  # type: ignore[arg-type]
    proposer.prepare(scorer, CLASSES, 1)
    assert len(proposer.units) == 6
    sentences = [f"{{}} {unit}." if site == "behind" else f"{unit} {{}}." for unit in proposer.units]
    values = influence(scorer, sentences)
    assert float(values.min()) > 0
    assert values.tolist() == sorted(values.tolist(), reverse=True)
