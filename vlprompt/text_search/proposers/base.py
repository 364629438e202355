"""What a proposer is asked, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vlprompt.text_search.budget import Budget
from vlprompt.text_search.scorer import Objective, Score, Scorer
from vlprompt.text_search.transcript import Exchange, Step

__all__ = ["Candidate", "Proposal", "Proposer", "Request"]


@dataclass(frozen=True)
class Candidate:
    """A scored template.

    Attributes:
        template: With one ``{}``.
        score: On the training samples.
        step: The step that proposed it.
    """

    template: str
    score: Score
    step: int

    def rank(self, objective: Objective) -> tuple[float, float, int, str]:
        """Return a key to sort by, the best first; no two candidates have the same."""
        return (*self.score.rank(objective), self.template)


@dataclass(frozen=True)
class Request:
    """What a proposer knows when it is asked.

    Attributes:
        step: Number of the step, from 1.
        count: How many templates are wanted; more are cut off.
        history: All candidates, the best first.
        seen: Every proposal so far in lower case, those that were refused among them.
        rng: For this step's draws.
        objective: What is maximised.
        notes: Sentences about the images and the mistakes, for proposers that read.
        past: Requests of this very step that were answered before a kill.
        budget: What may be spent.
        keep: Writes an exchange into the transcript.
    """

    step: int
    count: int
    history: Sequence[Candidate]
    seen: Collection[str]
    rng: np.random.Generator
    objective: Objective = "cross_entropy"
    notes: Sequence[str] = ()
    past: Sequence[Exchange] = ()
    budget: Budget = field(default_factory=Budget)
    keep: Callable[[Exchange], None] = lambda exchange: None


@dataclass(frozen=True)
class Proposal:
    """The answer to a request.

    Attributes:
        texts: Proposals as they came, unchecked.
        exhausted: Whether there will never be more.
    """

    texts: Sequence[str]
    exhausted: bool = False


class Proposer(ABC):
    """Proposes templates. A proposal depends on the request alone, so that a killed search goes on exactly.

    Attributes:
        identity: What it is, with all that its proposals depend on.
        reads_notes: Whether proposals depend on :attr:`Request.notes`, the descriptions of images among them.
    """

    identity: str
    reads_notes: ClassVar[bool] = False

    def prepare(self, scorer: Scorer, classnames: Sequence[str], seed: int) -> None:
        """Look at what is searched, once, before the first step; nothing by default."""

    def recorded(self, scorer: str) -> tuple[Step, ...]:
        """Return steps that are known already, scores included; none by default.

        Args:
            scorer: Identity of the scorer.
        """
        return ()

    @abstractmethod
    def propose(self, request: Request) -> Proposal:
        """Return proposals.

        Raises:
            BudgetSpentError: If asking would exceed the budget.
            VLPromptError: If whoever is asked does not answer; what came back before is in the transcript.
        """
