"""The search itself: propose, check, score, record, again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import numpy_rng
from vlprompt.core.version import package_version
from vlprompt.text_search.budget import Budget, BudgetSpentError, Usage
from vlprompt.text_search.proposers.base import Candidate, Proposer, Request
from vlprompt.text_search.scorer import Objective, Score, Scorer
from vlprompt.text_search.templates import Rules, normalised
from vlprompt.text_search.transcript import Exchange, Step, Transcript

__all__ = ["Outcome", "Settings", "describe_outcome", "search"]

log = logging.getLogger("vlprompt.run")

_BETTER = 1e-6  # of the objective; smaller gains do not count against patience


Describe = Callable[[Sequence[Exchange], Callable[[Exchange], None], Budget], Sequence[str]]
"""From what was asked before a kill, where to write what is asked, and a budget, to sentences about the images."""


@dataclass(frozen=True)
class Settings:
    """How long a search goes on, and for what.

    Attributes:
        objective: What is maximised on the training samples.
        steps: The most.
        proposals: Templates asked for in a step.
        patience: Steps without a better objective after which it stops.
        seed: Of all draws.
        feedback: Whether the worst confusions of the best template go to the proposer.
    """

    objective: Objective = "cross_entropy"
    steps: int = 30
    proposals: int = 8
    patience: int = 10
    seed: int = 1
    feedback: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        candidates: All scored templates, the best first by the objective on the training samples.
        stopped: Why it ended, in words.
        steps: How many were made.
        usage: What was spent, in killed runs of the same search, too.
    """

    candidates: tuple[Candidate, ...]
    stopped: str
    steps: int
    usage: Usage


def search(
    scorer: Scorer,
    proposer: Proposer,
    rules: Rules,
    start: Sequence[str],
    settings: Settings,
    *,
    budget: Budget | None = None,
    describe: Describe | None = None,
    described_by: str = "",
    classnames: Sequence[str] = (),
    transcript: Path | None = None,
    resume: bool = False,
) -> tuple[Outcome, Transcript]:
    """Search templates.

    Args:
        scorer: Scores on the samples that steer the search.
        proposer: See :class:`Proposer`.
        rules: What a template must be.
        start: Templates that are scored first.
        settings: See there.
        budget: What may be spent; None: anything.
        describe: Makes sentences about the images, for proposers that read.
        described_by: What makes them; a part of what the search is.
        classnames: C names, for words about confusions.
        transcript: File; None keeps none.
        resume: Whether to go on with the file that is there.

    Returns:
        The outcome, and the transcript, to which the caller adds the result.

    Raises:
        CheckpointError: If the transcript was changed or is another search's.
        VLPromptError: If whoever proposes does not answer, or never with a template; the transcript stays.
    """
    budget = budget or Budget()
    header = {
        "version": package_version(),
        "scorer": scorer.identity,
        "proposer": proposer.identity,
        "settings": asdict(settings),
        "start": list(start),
        "described_by": described_by,
    }
    record = Transcript(transcript, header, resume)
    for exchange in record.exchanges:
        budget.spend(exchange.usage)

    described = [exchange for exchange in record.exchanges if exchange.step < 0]
    notes = [] if describe is None else list(describe(described, record.exchange, budget))
    state = _Search(scorer, proposer, rules, settings, budget, notes, list(classnames), record)
    return state.run(start), record


class _Search:
    """The state of a running search."""

    def __init__(
        self,
        scorer: Scorer,
        proposer: Proposer,
        rules: Rules,
        settings: Settings,
        budget: Budget,
        notes: list[str],
        classnames: list[str],
        transcript: Transcript,
    ) -> None:
        self.scorer = scorer
        self.proposer = proposer
        self.rules = rules
        self.settings = settings
        self.budget = budget
        self.notes = notes
        self.classnames = classnames
        self.transcript = transcript

        self.candidates: list[Candidate] = []
        self.seen: set[str] = set()
        self.best = float("-inf")
        self.best_step = 0
        self.steps = 0
        self.answers = 0
        self.is_exhausted = False

    def run(self, start: Sequence[str]) -> Outcome:
        """Search to the end."""
        recorded = self.transcript.steps or self.proposer.recorded(self.scorer.identity)
        for step in recorded:
            self._take(step)
            self.scorer.remember(step.scores)
            if not self.transcript.steps:  # a replay writes a transcript of its own
                self.transcript.step(step)

        if not recorded:
            self._finish(0, list(start), checked=True)

        self.proposer.prepare(self.scorer, self.classnames, self.settings.seed)
        stopped = ""
        while not (stopped := self._reason()):
            try:
                self._step(self.steps + 1)
            except BudgetSpentError as error:
                stopped = f"the budget of {error} is spent"
                break

        if self.steps and not self.answers:
            raise VLPromptError(
                f"{self.proposer.identity}: in {self.steps} steps there was not one template that could be scored. "
                "What was answered stands in the transcript, and at each step's rejected why it was refused."
            )
        return Outcome(tuple(self.candidates), stopped, self.steps, self.budget.spent)

    def _reason(self) -> str:
        """Return why the search ends here, empty if it goes on."""
        if self.is_exhausted:
            return "the proposer has nothing left"
        if self.steps >= self.settings.steps:
            return f"{self.settings.steps} steps were made"
        if self.steps - self.best_step >= self.settings.patience:
            return f"{self.settings.patience} steps brought nothing better"
        return ""

    def _step(self, number: int) -> None:
        """Make one step."""
        past = [exchange for exchange in self.transcript.exchanges if exchange.step == number]
        request = Request(
            step=number,
            count=self.settings.proposals,
            history=tuple(self.candidates),
            seen=frozenset(self.seen),
            rng=numpy_rng(self.settings.seed, "proposals", number),
            objective=self.settings.objective,
            notes=tuple(self._notes()),
            past=past,
            budget=self.budget,
            keep=self.transcript.exchange,
        )
        proposal = self.proposer.propose(request)
        self._finish(number, list(proposal.texts), exhausted=proposal.exhausted)

    def _finish(self, number: int, texts: list[str], checked: bool = False, exhausted: bool = False) -> None:
        """Check and score proposals, and write the step down.

        Args:
            number: Of the step.
            texts: As they came.
            checked: The start, which is taken as it is written.
            exhausted: Whether the proposer has nothing left.
        """
        rejected: list[tuple[str, str]] = []
        templates: list[str] = []
        for text in texts:
            template = text if checked else normalised(text)
            reason = "" if checked else self._problem(template, templates)
            if reason:
                rejected.append((text, reason))
            else:
                templates.append(template)

        kept = list(templates) if checked else self.scorer.shortlist(templates, self.settings.objective)
        rejected += [
            (text, "the worse half of a race on some classes") for text in templates if text not in kept
        ]

        scores = dict(zip(kept, self.scorer.score(kept), strict=True))
        step = Step(number, scores, tuple(rejected), exhausted)
        self.transcript.step(step)
        self._take(step)

    def _problem(self, template: str, before: Sequence[str]) -> str:
        if template.casefold() in self.seen or template.casefold() in {t.casefold() for t in before}:
            return "duplicate"
        return self.rules.problem(template)

    def _take(self, step: Step) -> None:
        """Put a finished step into the state."""
        objective = self.settings.objective
        self.steps = step.number
        self.is_exhausted = step.exhausted
        self.seen |= {normalised(text).casefold() for text, _ in step.rejected}

        for template, score in step.scores.items():
            self.seen.add(template.casefold())
            self.candidates.append(Candidate(template, score, step.number))
            self.answers += step.number > 0
            if score.value(objective) > self.best + _BETTER:
                self.best = score.value(objective)
                self.best_step = step.number

        self.candidates.sort(key=lambda candidate: candidate.rank(objective))
        if step.number:
            log.debug(
                "step %d: %d scored, %d rejected, best %r",
                *(step.number, len(step.scores), len(step.rejected), self.candidates[0].template),
            )

    def _notes(self) -> list[str]:
        """Return the notes, and what the best template confuses."""
        if not (self.settings.feedback and self.classnames and self.candidates):
            return self.notes
        return [*self.notes, *_mistakes(self.candidates[0].score, self.classnames)]


def _mistakes(score: Score, classnames: Sequence[str]) -> list[str]:
    """Return what a template confuses, and the classes that it finds least, in words."""
    sentences = [
        f"{100 * share:.0f} % of the images of {classnames[true]!r} are taken for {classnames[answer]!r}."
        for true, answer, share in score.confusions
    ]
    known: Mapping[int, float] = {i: recall for i, recall in enumerate(score.recalls) if recall >= 0}
    worst = sorted(known, key=lambda i: (known[i], i))[:3]
    low = [f"{classnames[i]!r} ({100 * known[i]:.0f} %)" for i in worst if known[i] < 1]
    return [*sentences, f"Found least: {', '.join(low)}."] if low else sentences


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome's numbers as plain values, for a transcript."""
    return {"stopped": outcome.stopped, "steps": outcome.steps, "usage": outcome.usage.record()}
