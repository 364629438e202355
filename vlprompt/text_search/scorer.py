"""How good a template is: the scores, and whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from vlprompt.core.errors import VLPromptError

__all__ = ["Objective", "Score", "Scorer"]

Objective = Literal["cross_entropy", "accuracy", "gap"]
"""What a search maximises: minus the cross-entropy, the accuracy, or the mean gap to the strongest other class."""

_DIGITS = 6  # of a value that ranks: a sentence's score depends in its last bits on what is encoded beside it


@dataclass(frozen=True)
class Score:
    """What one template, or the mean of several, reaches on labelled samples.

    Attributes:
        accuracy: A fraction.
        cross_entropy: Mean, in nats.
        gap: Mean over samples of the probability of the true class minus the largest of the others, in [-1, 1].
        tokens: Of the template without a class name; the sum for several.
        recalls: For each class, the share of its samples that are right; -1 for a class without samples.
        confusions: The worst (true class, answer, share of the true class's samples), as class numbers.
    """

    accuracy: float
    cross_entropy: float
    gap: float
    tokens: int
    recalls: tuple[float, ...] = ()
    confusions: tuple[tuple[int, int, float], ...] = ()

    def value(self, objective: Objective) -> float:
        """Return what is maximised."""
        values = {"accuracy": self.accuracy, "gap": self.gap, "cross_entropy": -self.cross_entropy}
        return round(values[objective], _DIGITS)

    def rank(self, objective: Objective) -> tuple[float, float, int]:
        """Return a key to sort by, the best first: the objective, then the cross-entropy, then fewer tokens."""
        return (-self.value(objective), round(self.cross_entropy, _DIGITS), self.tokens)

    def record(self) -> dict[str, Any]:
        """Return the score as plain values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Score:
        """Return what :meth:`record` described."""
        confusions = tuple((int(a), int(b), float(share)) for a, b, share in record["confusions"])
        return cls(**{**record, "recalls": tuple(record["recalls"]), "confusions": confusions})


class Scorer(ABC):
    """Scores templates; one for each task, or one of your own.

    Attributes:
        identity: Changes when any score does: data, labels, class names, model. A transcript belongs to one identity.
        scored: How many templates were computed so far, without those that were remembered.
    """

    identity: str
    scored: int = 0

    @abstractmethod
    def score(self, templates: Sequence[str]) -> list[Score]:
        """Return the score of each template."""

    def remember(self, scores: Mapping[str, Score]) -> None:
        """Take in scores that this very scorer gave before a kill, so that they are not computed in other company."""

    def shortlist(self, templates: Sequence[str], objective: Objective) -> list[str]:
        """Return the templates that are worth a full score, in order; all of them, where scores are cheap."""
        return list(templates)

    def features(self, texts: Sequence[str]) -> Tensor:
        """Return (N, d) unit-length text features of plain sentences.

        Raises:
            VLPromptError: If the scorer has none; proposers that cluster or compare texts need them.
        """
        raise VLPromptError(f"{type(self).__name__} has no text features, which this proposer needs.")

    def probabilities(self, templates: Sequence[str]) -> Tensor:
        """Return (K, n, C) class probabilities of the samples; templates may leave out everything but ``{}``.

        Raises:
            VLPromptError: If the scorer has none; proposers that measure a word's influence need them.
        """
        raise VLPromptError(f"{type(self).__name__} has no class probabilities, which this proposer needs.")
