"""What a search ends with: which templates are taken, and what each word of one is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.loop import Outcome
from vlprompt.text_search.scorer import Objective, Score, Scorer

__all__ = ["Choice", "Occlusion", "choose", "occlusion"]


@dataclass(frozen=True)
class Choice:
    """The templates that were taken, with the scores that they were taken by.

    Attributes:
        templates: One or several, whose features are averaged.
        train: Their score on the samples that steered the search.
        val: Their score on validation samples; None if there are none.
        start_train: What the start reaches on the former.
        start_val: And on the latter.
    """

    templates: tuple[str, ...]
    train: Score
    val: Score | None
    start_train: Score
    start_val: Score | None

    def figures(self) -> dict[str, float]:
        """Return accuracies and what the best of many is better by on the samples that chose it."""
        numbers = {"train_accuracy": self.train.accuracy, "start_train_accuracy": self.start_train.accuracy}
        if self.val is not None and self.start_val is not None:
            numbers |= {
                "val_accuracy": self.val.accuracy,
                "start_val_accuracy": self.start_val.accuracy,
                "train_val_gap": self.train.accuracy - self.val.accuracy,
            }
        return numbers

    def record(self) -> dict[str, Any]:
        """Return the choice as plain values."""
        return {
            "templates": list(self.templates),
            "train": self.train.record(),
            "val": None if self.val is None else self.val.record(),
        }


def choose(
    outcome: Outcome,
    start: Sequence[str],
    scorer: EmbeddingScorer,
    val: EmbeddingScorer | None,
    objective: Objective,
    *,
    best: int = 10,
    ensemble: int = 1,
) -> Choice:
    """Choose among the best candidates, the mean of several, and the start.

    The best of many candidates looks better on the samples that ranked it than it is, so validation samples choose
    among the few best. The start takes part, so that the choice is never worse than it there.

    Args:
        outcome: Of the search.
        start: Hand-written templates; taken together, as zero-shot classification takes them.
        scorer: On the training samples.
        val: On validation samples; None: the training samples choose.
        objective: What is maximised.
        best: How many candidates take part.
        ensemble: Of how many templates the mean may be taken.
    """
    templates = [candidate.template for candidate in outcome.candidates[: max(best, ensemble)]]
    options: list[tuple[str, ...]] = [tuple(start)]
    options += [(template,) for template in templates[:best]]
    options += [tuple(templates[:size]) for size in range(2, min(ensemble, len(templates)) + 1)]
    options = list(dict.fromkeys(options))

    judge = scorer if val is None else val
    scores = [_score(judge, option) for option in options]
    place = min(range(len(options)), key=lambda i: (scores[i].rank(objective), i))
    chosen = options[place]

    return Choice(
        chosen,
        _score(scorer, chosen),
        None if val is None else scores[place],
        _score(scorer, tuple(start)),
        None if val is None else scores[0],
    )


@dataclass(frozen=True)
class Occlusion:
    """What happens where one word is left out.

    Attributes:
        word: The word.
        template: The template without it.
        score: Of that.
        loss: How much the objective falls; negative where the template is better without.
    """

    word: str
    template: str
    score: Score
    loss: float


def occlusion(scorer: Scorer, template: str, objective: Objective) -> list[Occlusion]:
    """Return the score without each word, in the order of the words; the class name stays.

    Args:
        scorer: Scores the shorter templates.
        template: The template.
        objective: What the losses are of.
    """
    words = template.split()
    places = [place for place, word in enumerate(words) if "{}" not in word]
    shorter = [" ".join(words[:place] + words[place + 1 :]) for place in places]

    whole = scorer.score([template])[0].value(objective)
    scores = scorer.score(shorter)
    return [
        Occlusion(words[place], text, score, whole - score.value(objective))
        for place, text, score in zip(places, shorter, scores, strict=True)
    ]


def _score(scorer: EmbeddingScorer, templates: Sequence[str]) -> Score:
    return scorer.score(templates)[0] if len(templates) == 1 else scorer.score_together(templates)
