"""Search by a policy that is trained with rewards: which word to put next, learned from the scores of whole templates.

Deng et al., "RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning", EMNLP 2022, arXiv 2205.12548, in
small: their policy is a language model with an MLP and learns by soft Q-learning from 12,000 steps; this one is an MLP
over a few dozen words that were clustered and pruned (see :mod:`vlprompt.text_search.units`) and learns by REINFORCE
(Williams, Machine Learning 1992). Kept of theirs: rewards of a step are standardised, templates are sampled, and the
best that was ever scored is the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.core.options import whole_options
from vlprompt.core.seeding import numpy_rng, torch_rng
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.scorer import Scorer
from vlprompt.text_search.units import Site, UnitOptions, found_units, unit_identity, whole_template

__all__ = ["Policy", "UnitPolicy", "advantages", "policy_loss"]


class UnitPolicy(nn.Module):
    """Chooses units one after the other: softmax(tanh((m + p_l) W1 + b1) W2 + b2), m the mean of the units before.

    W2 and b2 are 0 at the start, so that all units are equally likely. Everything is float64, on the CPU.

    Args:
        features: (V, d) of the units.
        length: L, places.
        width: Of the hidden layer, h.
        generator: Draws W1 and the places' vectors.
    """

    features: Tensor

    def __init__(self, features: Tensor, length: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("features", features.detach().cpu().double())
        count, dim = self.features.shape

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(dim**-0.5 * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.places = drawn(length, dim)
        self.inner = drawn(dim, width)
        self.inner_bias = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        self.outer = nn.Parameter(torch.zeros(width, count, dtype=torch.float64))
        self.outer_bias = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, units: Tensor) -> Tensor:
        """Return (K, l + 1, V) log-probabilities of the units at each place, given the (K, l) before it, l < L."""
        chosen = self.features[units]  # (K, l, d)
        counts = torch.arange(1, units.shape[1] + 1, dtype=torch.float64)[:, None]
        nothing = chosen.new_zeros(len(units), 1, self.features.shape[1])
        means = torch.cat([nothing, chosen.cumsum(1) / counts], 1)

        hidden = torch.tanh((means + self.places[: means.shape[1]]) @ self.inner + self.inner_bias)
        return (hidden @ self.outer + self.outer_bias).log_softmax(-1)

    @torch.no_grad()
    def sample(self, draws: np.ndarray) -> Tensor:
        """Return (K, L) units of (K, L) numbers in [0, 1): the first whose cumulated probability is above each."""
        units = torch.zeros(len(draws), 0, dtype=torch.long)
        for place in range(draws.shape[1]):
            cumulated = self(units)[:, -1].exp().cumsum(-1)
            point = torch.from_numpy(draws[:, place : place + 1].copy())
            # Sums end a rounding below 1.
            unit = (cumulated <= point).sum(-1).clamp(max=len(self.features) - 1)
            units = torch.cat([units, unit[:, None]], 1)
        return units


def advantages(rewards: Tensor) -> Tensor:
    """Return (K,) rewards less their mean, in standard deviations; all 0 where they are equal."""
    centred = rewards - rewards.mean()
    spread = rewards.std(unbiased=False)
    return centred / spread if float(spread) > 0 else torch.zeros_like(rewards)


def policy_loss(policy: UnitPolicy, units: Tensor, rewards: Tensor, entropy: float) -> Tensor:
    """Return what REINFORCE minimises: - mean over samples of advantage * log p(sample), less entropy.

    Args:
        policy: See there.
        units: (K, L) that were sampled.
        rewards: (K,), of the whole samples.
        entropy: Weight of the mean entropy of a choice, in nats.
    """
    log_probabilities = policy(units[:, :-1])
    chosen = log_probabilities.gather(-1, units[..., None])[..., 0].sum(1)
    spread = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    return -(advantages(rewards) * chosen).mean() - entropy * spread


@PROPOSERS.register(
    "policy", summary="words chosen by a small policy that learns from rewards (RLPrompt)", paper="2205.12548"
)
class Policy(Proposer):
    """Samples sequences of units, and makes those likelier that scored above the step's mean.

    Units are found as :class:`vlprompt.text_search.proposers.clusters.Clusters` finds them. In every step the policy
    samples as many sequences as proposals are wanted; what it has sampled before is not proposed again, and counts
    with the score that is known. Sequences that were refused or lost a race teach nothing. It is made anew from the
    history after a kill, so that the search goes on exactly.

    Args:
        width: Of the policy's hidden layer.
        lr: Rate of Adam.
        entropy: Weight of the entropy of a choice; the higher, the longer it goes on trying.
        options: Which units, how many and where, see :class:`UnitOptions`.

    Attributes:
        units: What is searched over, the most influential first.
    """

    def __init__(
        self,
        *,
        width: Annotated[int, Field(ge=1)] = 64,
        lr: Annotated[float, Field(gt=0)] = 0.02,
        entropy: Annotated[float, Field(ge=0)] = 0.01,
        **options: Unpack[UnitOptions],
    ) -> None:
        self.options = whole_options(UnitOptions, options)
        self.site: Site = self.options["site"]
        self.length: int = self.options["length"]
        self.width = width
        self.lr = lr
        self.entropy = entropy
        self.units: list[str] = []
        self.identity = f"policy {unit_identity(self.options)} width={width} lr={lr:g} entropy={entropy:g}"

    def prepare(self, scorer: Scorer, classnames: Sequence[str], seed: int) -> None:
        """See :meth:`Proposer.prepare`: find the units.

        Raises:
            VLPromptError: If there is none, or the scorer has no text features or probabilities.
        """
        units = found_units(scorer, classnames, seed, self.options)
        self.begin(units, scorer.features([f"a photo of a {unit}." for unit in units]), seed)

    def begin(self, units: Sequence[str], features: Tensor, seed: int) -> None:
        """Start with a policy that has learned nothing.

        Args:
            units: V words or phrases.
            features: (V, d) of them.
            seed: Of the policy and of all samples.
        """
        self.units = list(units)
        self.features = features
        self.seed = seed
        self.policy = UnitPolicy(features, self.length, self.width, torch_rng(seed, "policy of words"))
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.lr)
        # The last step that was sampled, and its samples, of which nothing was learned yet.
        self._step = 0
        self._sampled = torch.zeros(0, self.length, dtype=torch.long)

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        if self._step >= request.step:
            self.begin(self.units, self.features, self.seed)
        rewards = {c.template.casefold(): c.score.value(request.objective) for c in request.history}

        # Steps that another process made are sampled again: draws are the same, and so is what is learned of them.
        while self._step < request.step:
            self._learn(rewards)
            self._step += 1
            draws = numpy_rng(self.seed, "samples of the policy", self._step).random(
                (request.count, self.length)
            )
            self._sampled = self.policy.sample(draws)

        texts = dict.fromkeys(map(self._template, self._sampled.tolist()))
        return Proposal([text for text in texts if text.casefold() not in request.seen])

    def _learn(self, rewards: Mapping[str, float]) -> None:
        """Make one step of gradient from the last samples, of those that have a reward."""
        texts = [self._template(units).casefold() for units in self._sampled.tolist()]
        scored = [i for i, text in enumerate(texts) if text in rewards]
        if len(scored) < 2:  # one alone is the mean
            return

        values = torch.tensor([rewards[texts[i]] for i in scored], dtype=torch.float64)
        loss = policy_loss(self.policy, self._sampled[scored], values, self.entropy)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def _template(self, units: Sequence[int]) -> str:
        return whole_template(tuple(self.units[i] for i in units), self.site)
