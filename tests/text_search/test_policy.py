"""A policy over words that learns from rewards: its gradient against a loop and differences, what it finds, replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.text_search.conftest import CLASSES, ToyScorer
from vlprompt.backbones import Backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.loop import Outcome, Settings, search
from vlprompt.text_search.proposers.policy import Policy, UnitPolicy, advantages, policy_loss
from vlprompt.text_search.proposers.replay import Replay
from vlprompt.text_search.templates import Rules

UNITS = ["alpha", "bravo", "crimson", "delta", "echo", "foxtrot", "golf", "hotel"]


def made(length: int = 3, seed: int = 0) -> UnitPolicy:
    """A policy whose numbers are none of those that it starts with."""
    generator = torch.Generator().manual_seed(seed)
    policy = UnitPolicy(torch.randn(5, 6, generator=generator), length, 4, generator)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


def slow_probabilities(policy: UnitPolicy, before: Sequence[int]) -> list[float]:
    """Probabilities of the next unit, written out number by number."""
    features, places = policy.features.tolist(), policy.places.tolist()
    inner, inner_bias = policy.inner.tolist(), policy.inner_bias.tolist()
    outer, outer_bias = policy.outer.tolist(), policy.outer_bias.tolist()
    dim = len(features[0])
    mean = [sum(features[u][i] for u in before) / max(1, len(before)) for i in range(dim)]
    read = [mean[i] + places[len(before)][i] for i in range(dim)]
    hidden = [
        math.tanh(sum(read[i] * inner[i][j] for i in range(dim)) + inner_bias[j])
        for j in range(len(inner_bias))
    ]
    scores = [
        sum(hidden[j] * outer[j][v] for j in range(len(hidden))) + outer_bias[v]
        for v in range(len(outer_bias))
    ]
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def slow_loss(policy: UnitPolicy, units: Tensor, rewards: Sequence[float], entropy: float) -> float:
    """REINFORCE with a standardised reward, sample after sample and choice after choice."""
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    loss, uncertainty = 0.0, 0.0
    for sample, reward in zip(units.tolist(), rewards, strict=True):
        for place, unit in enumerate(sample):
            probabilities = slow_probabilities(policy, sample[:place])
            loss -= (reward - mean) / spread * math.log(probabilities[unit]) / len(rewards)
            uncertainty -= sum(p * math.log(p) for p in probabilities) / units.numel()
    return loss - entropy * uncertainty


def test_loss_and_gradient_are_those_of_a_slow_loop() -> None:
    policy = made()
    units = torch.tensor([[0, 1, 2], [4, 4, 0], [3, 0, 1], [0, 1, 2], [2, 2, 2]])
    rewards = [0.1, -2.0, 0.7, 0.1, 3.0]
    loss = policy_loss(policy, units, torch.tensor(rewards, dtype=torch.float64), 0.3)
    assert loss.item() == pytest.approx(slow_loss(policy, units, rewards, 0.3), abs=1e-12)

    loss.backward()
    step = 1e-6
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        for place in list(np.ndindex(*parameter.shape))[::3]:
            with torch.no_grad():
                parameter[place] += step
                above = slow_loss(policy, units, rewards, 0.3)
                parameter[place] -= 2 * step
                below = slow_loss(policy, units, rewards, 0.3)
                parameter[place] += step
            slope = (above - below) / (2 * step)
            assert float(parameter.grad[place]) == pytest.approx(slope, abs=1e-7), (name, place)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """REINFORCE is unbiased: weighted by their probabilities, all sequences give the slope of the mean reward."""
    policy = made(length=2)
    everything = torch.tensor(list(product(range(5), repeat=2)))
    rewards = torch.randn(25, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def chances() -> Tensor:
        return policy(everything[:, :-1]).gather(-1, everything[..., None])[..., 0].sum(1)

    expected = torch.autograd.grad((chances().exp() * rewards).sum(), policy.outer_bias)[0]
    weights = chances().exp().detach()
    baseline = (weights * rewards).sum()
    estimate = torch.autograd.grad((weights * (rewards - baseline) * chances()).sum(), policy.outer_bias)[0]
    torch.testing.assert_close(estimate, expected)


def test_samples_follow_the_probabilities() -> None:
    policy = made(length=2)
    units = policy.sample(np.random.default_rng(0).random((40000, 2)))
    first = torch.bincount(units[:, 0], minlength=5) / 40000
    expected = slow_probabilities(policy, [])
    assert first.tolist() == pytest.approx(expected, abs=0.01)
    after = units[units[:, 0] == 3][:, 1]
    second = torch.bincount(after, minlength=5) / len(after)
    assert second.tolist() == pytest.approx(slow_probabilities(policy, [3]), abs=0.03)
    assert policy.sample(np.full((1, 2), 1.0 - 1e-16)).max() <= 4


def test_all_units_are_equally_likely_at_the_start() -> None:
    policy = UnitPolicy(torch.randn(7, 3), 4, 5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(policy(torch.tensor([[1, 2, 3]])).exp(), torch.full((1, 4, 7), 1 / 7).double())


def test_advantages_are_standardised() -> None:
    values = advantages(torch.tensor([1.0, 2.0, 6.0]))
    assert float(values.mean()) == pytest.approx(0, abs=1e-6)
    assert float(values.square().mean()) == pytest.approx(1)
    assert advantages(torch.full((4,), 0.3)).tolist() == [0.0] * 4


class Ready(Policy):
    """Its units are given, with random features."""

    def prepare(self, scorer: object, classnames: Sequence[str], seed: int) -> None:
        self.begin(UNITS, torch.randn(len(UNITS), 16, generator=torch.Generator().manual_seed(7)), seed)


def run(backbone: Backbone, path: Path | None = None, resume: bool = False, **changes: object) -> Outcome:
    """Search a toy in which one word is worth something, and another costs."""
    settings = Settings(**{"steps": 25, "proposals": 8, "patience": 99, "seed": 1, **changes})  # type: ignore[arg-type]
    scorer = ToyScorer({"crimson": 2.0, "golf": -1.0})
    proposer = Ready(length=2, lr=0.1)
    outcome, transcript = search(
        scorer, proposer, Rules(backbone, CLASSES), ["{}."], settings, transcript=path, resume=resume
    )
    transcript.result({"templates": [outcome.candidates[0].template]})
    return outcome


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_planted_word_is_sampled_ever_more_often(seed: int, backbone: Backbone) -> None:
    proposer = Ready(length=2, lr=0.1)
    settings = Settings(steps=25, proposals=8, patience=99, seed=seed)
    scorer = ToyScorer({"crimson": 2.0, "golf": -1.0})
    before = UnitPolicy(torch.zeros(8, 16), 2, 64, torch.Generator()).sample(
        np.random.default_rng(0).random((500, 2))
    )
    search(scorer, proposer, Rules(backbone, CLASSES), ["{}."], settings)
    after = proposer.policy.sample(np.random.default_rng(0).random((500, 2)))

    def mean_reward(samples: Tensor) -> float:
        texts = [proposer._template(units) for units in samples.tolist()]
        return float(np.mean([-score.cross_entropy for score in scorer.score(texts)]))

    assert mean_reward(after) > mean_reward(before) + 0.5
    assert float((after == UNITS.index("crimson")).any(1).float().mean()) > 0.6


def test_it_finds_the_word_and_asks_for_no_score_twice(backbone: Backbone) -> None:
    outcome = run(backbone)
    assert "crimson" in outcome.candidates[0].template
    templates = [candidate.template for candidate in outcome.candidates]
    assert len(templates) == len(set(templates)) <= 1 + 25 * 8


def test_the_same_seed_gives_the_same_search(backbone: Backbone, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(backbone, tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.parametrize("kill", [1, 6, 20])
def test_a_killed_search_goes_on_to_the_same_bytes(kill: int, backbone: Backbone, tmp_path: Path) -> None:
    """The policy is in no file: it learns once more from the scores of the transcript."""
    whole = tmp_path / "whole.jsonl"
    outcome = run(backbone, whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(lines[: kill + 1]) + lines[kill + 1][:20])
    assert run(backbone, part, resume=True) == outcome
    assert part.read_bytes() == whole.read_bytes()


def test_a_search_can_be_replayed(backbone: Backbone, tmp_path: Path) -> None:
    outcome = run(backbone, tmp_path / "t")
    settings = Settings(steps=25, proposals=8, patience=99)
    again, _ = search(
        ToyScorer({"crimson": 2.0, "golf": -1.0}),
        Replay(path=str(tmp_path / "t")),
        Rules(backbone, CLASSES),
        ["{}."],
        settings,
    )
    assert again.candidates == outcome.candidates


def test_words_of_a_real_tokenizer(scorer: EmbeddingScorer, backbone: Backbone) -> None:
    proposer = Policy(vocabulary=60, clusters=12, percentile=50, length=2)
    settings = Settings(objective="gap", steps=3, proposals=6, patience=9)
    outcome, _ = search(scorer, proposer, Rules(backbone, CLASSES), ["{}."], settings)
    assert 2 <= len(proposer.units) <= 6
    assert proposer.policy.features.shape == (len(proposer.units), backbone.dim)
    assert len(outcome.candidates) > 1
    with pytest.raises(VLPromptError, match="no text features"):
        Policy(source="phrases").prepare(ToyScorer({}), CLASSES, 1)
