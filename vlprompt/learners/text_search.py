"""Text search: templates that people can read, found without gradients on the training images' embeddings.

Papers: Du et al., "IPO: Interpretable Prompt Optimization for Vision-Language Models", NeurIPS 2024, arXiv 2410.15397
(``proposer="chat"`` and ``"local"``); Zhou et al., Findings of EMNLP 2023, arXiv 2310.12774 (``"clusters"``); Deng
et al., EMNLP 2022, arXiv 2205.12548 (``"policy"``). What is searched, by whom, and where this differs from the
papers: :mod:`vlprompt.text_search` and its proposers.

Where this differs from IPO: training images steer and validation images choose among the best, with the hand-written
templates among them; templates may not name a class; the offline grammar is the default.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, ConfigError, DataError, VLPromptError
from vlprompt.core.names import check_templates
from vlprompt.core.paths import user_path
from vlprompt.core.processes import process_state
from vlprompt.core.trainable import misfits
from vlprompt.data import ImageDataset
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.hooks import TrainingSamples
from vlprompt.text_search.budget import Budget
from vlprompt.text_search.choice import Choice, choose, occlusion
from vlprompt.text_search.describers import check_describer, create_describer, described
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.loop import Outcome, Settings, describe_outcome, search
from vlprompt.text_search.proposers import PROPOSERS, check_proposer, create_proposer
from vlprompt.text_search.scorer import Objective
from vlprompt.text_search.transcript import Exchange

__all__ = ["TextSearch"]

log = logging.getLogger("vlprompt.run")

_BYTES = 4096  # of what was found, as JSON; eight templates of 400 characters fit
_TRANSCRIPT = "transcript.jsonl"

_Describe = Callable[[Sequence[Exchange], Callable[[Exchange], None], Budget], Sequence[str]]


@LEARNERS.register(
    "text_search", summary="readable templates found without gradients (IPO)", paper="2410.15397"
)
class TextSearch(Learner):
    """Zero-shot classification with templates that a search found; the search is :meth:`solve`.

    The hand-written templates are scored first and stay a choice. Then, step by step, a proposer gets what was scored
    so far and proposes; what is new, readable by the tower and names no class is scored on the training images'
    embeddings. In the end validation images choose among the best ten, the mean of several, and the hand-written
    templates together. Without validation images the training images choose, with a warning: the best of many looks
    better on what chose it than it is.

    What is learned is text. It names no class, so it serves other classes (base-to-new, cross-dataset), every other
    learner and every adapter (``data.templates: file:PATH``).

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Where the search starts.
        proposer: Who proposes: ``grammar`` (offline), ``chat``, ``local``, ``clusters``, ``policy``, ``retrieval``,
            ``replay``.
        proposer_options: Its own options.
        objective: What is maximised: the ``accuracy`` (of equals the lower cross-entropy, then the shorter), minus the
            ``cross_entropy``, or the ``gap`` between the true class and the strongest other. The last two also pay
            for confidence, which templates change by much.
        steps: The most.
        proposals: Templates in a step.
        patience: Steps without a better objective after which it stops.
        ensemble: Of how many of the best templates the mean may be taken.
        feedback: Whether proposers that read are told what the best template confuses.
        describer: Who describes training images for proposers that read: ``captions`` (of the scenes), ``chat``,
            ``file:PATH`` with a description on each line; empty: nobody.
        describer_options: Its own options, for ``chat`` those of the proposer.
        descriptions: The most images that are described.
        max_requests: Requests that may be sent to a language model, repetitions among them.
        max_tokens: Tokens that it may read and write.
        max_price: What it may cost, in the currency of ``prices``, which must be given; None: no limit.
        race_classes: With more classes than this, templates race on so many before they are scored on all.
        memo: Folder where scores are kept between runs; empty: none.
        transcript: File of the transcript; empty: ``transcript.jsonl`` in the run's folder, if there is one.
    """

    solves = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        proposer: str = "grammar",
        proposer_options: Mapping[str, Any] | None = None,
        objective: Objective = "accuracy",
        steps: Annotated[int, Field(ge=0)] = 30,
        proposals: Annotated[int, Field(ge=1)] = 8,
        patience: Annotated[int, Field(ge=1)] = 10,
        ensemble: Annotated[int, Field(ge=1, le=8)] = 1,
        feedback: bool = True,
        describer: str = "",
        describer_options: Mapping[str, Any] | None = None,
        descriptions: Annotated[int, Field(ge=1)] = 50,
        max_requests: Annotated[int, Field(ge=1)] = 300,
        max_tokens: Annotated[int, Field(ge=1)] = 2_000_000,
        max_price: Annotated[float, Field(gt=0)] | None = None,
        race_classes: Annotated[int, Field(ge=2)] = 100,
        memo: str = "",
        transcript: str = "",
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.proposer = proposer
        self.proposer_options = dict(proposer_options or {})
        check_proposer(proposer, self.proposer_options)
        self.describer = describer
        self.describer_options = dict(describer_options or {})
        if describer:
            check_describer(describer, self.describer_options)
            _check_reader(proposer)
        elif self.describer_options:
            raise ConfigError(
                ["describer_options: there is no describer; name one: describer."], "text_search"
            )
        asked = (self.proposer_options, self.describer_options)
        if max_price is not None and not any(any(options.get("prices", ())) for options in asked):
            raise ConfigError(
                [
                    "max_price: nothing here has a price; give prices in proposer_options or describer_options."
                ],
                "text_search",
            )

        self.objective: Objective = objective
        self.steps = steps
        self.proposals = proposals
        self.patience = patience
        self.ensemble = ensemble
        self.feedback = feedback
        self.descriptions = descriptions
        self.limits = (max_requests, max_tokens, max_price)
        self.race_classes = race_classes
        self.memo = user_path(memo) if memo else None
        self.transcript = user_path(transcript) if transcript else None

        self._folder: Path | None = None
        self._resume = False
        self._data: ImageDataset | None = None
        self._figures: dict[str, float] = {}
        self._found: tuple[str, ...] = ()
        self.register_buffer("found", torch.zeros(_BYTES, dtype=torch.uint8), persistent=False)
        weights = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("weights", weights, persistent=False)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; the unit-length class weights."""
        return self.get_buffer("weights")

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; the embeddings, which have unit length."""
        return self.get_buffer("weights")

    def found_templates(self) -> tuple[str, ...]:
        """See :meth:`LearnerHooks.found_templates`."""
        return self._found

    def figures(self) -> dict[str, float]:
        """Return accuracies on training and validation images, of what was found and of the start, and the costs."""
        return dict(self._figures)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what was found: a JSON list as UTF-8 bytes, filled up with zeros."""
        return {"found": self.get_buffer("found")}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`.

        Raises:
            CheckpointError: Also if the bytes are no list of templates.
        """
        problems = misfits(self.trainable_state(), state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")
        self._take(_unpacked(state["found"], self.title()))

    def enter_folder(self, folder: Path | None, resume: bool) -> None:
        """See :meth:`LearnerHooks.enter_folder`; the transcript is written there."""
        self._folder = folder
        self._resume = resume

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """Remember the training images, which a describer may look at."""
        self._data = sources[0].data

    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """See :meth:`LearnerHooks.solve`: search; returns what was found and by which scores.

        Of several processes one searches, and tells the others.

        Raises:
            VLPromptError: See :func:`vlprompt.text_search.loop.search`.
        """
        state = process_state()
        if state.num_processes == 1:
            found, record, figures = self._search(train, val, seed)
        else:
            answer: list[Any] = [None]
            if state.is_main_process:
                try:
                    answer = [self._search(train, val, seed)]
                except VLPromptError as error:
                    answer = [str(error)]
            answer = broadcast_object_list(answer)
            if isinstance(answer[0], str):
                raise VLPromptError(answer[0])
            found, record, figures = answer[0]

        self._take(found)
        self._figures = figures
        return record

    def _search(
        self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor] | None, seed: int
    ) -> tuple[tuple[str, ...], dict[str, Any], dict[str, float]]:
        """Return the templates, the record of the history, and the figures."""
        scorer = self._scorer(train)
        judge = None if val is None or not len(val[1]) else self._scorer(val)
        if judge is None:
            log.warning(
                "text_search: there are no validation data, so the training images choose among templates that they "
                "ranked: expect less on other images."
            )

        settings = Settings(self.objective, self.steps, self.proposals, self.patience, seed, self.feedback)
        outcome, transcript = search(
            scorer,
            create_proposer(self.proposer, self.proposer_options),
            scorer.rules,
            self.templates,
            settings,
            budget=Budget(*self.limits),
            describe=self._describe(seed),
            described_by=self.describer,
            classnames=self.classnames,
            transcript=self._transcript(),
            resume=self._resume,
        )

        choice = choose(outcome, self.templates, scorer, judge, self.objective, ensemble=self.ensemble)
        words = occlusion(scorer, choice.templates[0], self.objective)
        record = {
            "templates": list(choice.templates),
            "stopped": outcome.stopped,
            "occlusion": [[part.word, round(part.loss, 6)] for part in words],
        }
        transcript.result({**describe_outcome(outcome), **choice.record(), "occlusion": record["occlusion"]})
        log.info("text_search: %s; found %s", outcome.stopped, " | ".join(choice.templates))
        return choice.templates, record, _figures_of(choice, outcome)

    def _scorer(self, samples: tuple[Tensor, Tensor]) -> EmbeddingScorer:
        embeddings, labels = samples
        return EmbeddingScorer(
            self.backbone,
            self.classnames,
            embeddings,
            labels,
            memo=self.memo,
            race_classes=self.race_classes,
        )

    def _describe(self, seed: int) -> _Describe | None:
        """Return what describes the training images; None if nobody is to."""
        if not self.describer:
            return None

        describer = create_describer(self.describer, self.describer_options)
        data = self._data
        if data is None:
            raise DataError(
                "text_search: a describer looks at images, and only embeddings were given; use fit()."
            )
        return lambda past, keep, budget: described(
            describer, data, self.descriptions, seed, past, keep, budget
        )

    def _transcript(self) -> Path | None:
        if self.transcript is not None:
            return self.transcript
        return None if self._folder is None else self._folder / _TRANSCRIPT

    def _take(self, templates: Sequence[str]) -> None:
        """Classify with templates from here on; with the hand-written ones if there are none."""
        packed = _packed(templates)
        self._found = tuple(templates)
        self.get_buffer("found").copy_(packed)
        weights = self.backbone.class_weights(self.classnames, self._found or self.templates)
        self.get_buffer("weights").copy_(weights)
        self._cached_weights = None


def _figures_of(choice: Choice, outcome: Outcome) -> dict[str, float]:
    """Return what describes a search as numbers."""
    numbers = choice.figures()
    numbers |= {"scored": float(len(outcome.candidates)), "steps": float(outcome.steps)}
    if outcome.usage.requests:
        numbers |= {"requests": float(outcome.usage.requests), "tokens": float(outcome.usage.tokens)}
    if outcome.usage.price:
        numbers["price"] = outcome.usage.price
    return numbers


def _packed(templates: Sequence[str]) -> Tensor:
    """Return (4096,) bytes of a JSON list; all zero if there is none.

    Raises:
        DataError: If it does not fit.
    """
    result = torch.zeros(_BYTES, dtype=torch.uint8)
    if not templates:
        return result

    data = json.dumps(list(templates), ensure_ascii=False).encode()
    if len(data) > _BYTES:
        raise DataError(
            f"text_search: the templates take {len(data)} bytes, and {_BYTES} are kept. Use fewer or shorter ones."
        )
    result[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return result


def _unpacked(packed: Tensor, title: str) -> tuple[str, ...]:
    """Return the templates of :func:`_packed`.

    Raises:
        CheckpointError: If the bytes are no list of templates.
    """
    data = bytes(packed.cpu().tolist()).rstrip(b"\0")
    if not data:
        return ()
    try:
        templates = json.loads(data)
        if not isinstance(templates, list) or not all(isinstance(text, str) for text in templates):
            raise TypeError("no list of texts")
        return check_templates(templates)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"this state does not fit {title}: found holds no templates ({error})."
        ) from None


def _check_reader(proposer: str) -> None:
    """Refuse a describer beside a proposer whose templates do not depend on what it says."""
    if not PROPOSERS.get(proposer).target.reads_notes:
        readers = [name for name in PROPOSERS.names() if PROPOSERS.get(name).target.reads_notes]
        raise ConfigError(
            [f"describer: the proposer {proposer!r} reads no descriptions; {', '.join(readers)} do."],
            "text_search",
        )
