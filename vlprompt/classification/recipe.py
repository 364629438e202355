"""Training options where nobody gives any: the paper's on the paper's backbones, elsewhere a small search.

The search tries a few learning rates on a part of the shots and scores them on the rest. It never sees test data, it is
seeded, and its budget is counted in steps, so the same data always give the same options.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vlprompt.classification.evaluate import evaluate
from vlprompt.core.errors import NonFiniteError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.learners import Learner, create_learner
from vlprompt.learners.recipe import PAPER_BACKBONES

__all__ = ["AutomaticRecipe", "RecipeName", "find_recipe", "hold_back", "paper_options"]

RecipeName = Literal["auto", "paper", "none"]

log = logging.getLogger("vlprompt.run")

_HELD_BACK = 4  # one of so many shots of a class
_ELSEWHERE = ("epochs", "lr", "schedule", "warmup_epochs", "warmup_lr", "batch_size", "select")
_REFINEMENT = 10**0.5

Train = Callable[[Learner, ImageDataset, ImageDataset | None, Mapping[str, Any]], object]
"""Trains (learner, samples, validation samples or None, options) in place."""


@dataclass(frozen=True)
class AutomaticRecipe:
    """What is trained, how, and why.

    Attributes:
        options: Training options.
        train: The samples to train on.
        val: The samples to choose on; None if there are none.
        figures: ``recipe/lr``, the rate that was chosen, and ``recipe/accuracy`` and ``recipe/zero_shot_accuracy`` on
            the shots that were held back.
    """

    options: dict[str, Any]
    train: ImageDataset
    val: ImageDataset | None
    figures: dict[str, float]


def find_recipe(
    learner: Learner,
    train: ImageDataset,
    val: ImageDataset | None,
    seed: int,
    cache: FeatureCache,
    fit: Train,
) -> AutomaticRecipe:
    """Return how to train a learner for which nobody gave any option.

    Args:
        learner: Not changed.
        train: All training samples.
        val: Validation samples, if there are any; the search does not use them.
        seed: Of the split of the shots, and of the trials.
        cache: Of image embeddings.
        fit: Trains a learner.
    """
    recipe = learner.recipe
    kept, held = hold_back(train, seed)

    train_on, choose_on = train, val
    if learner.chooses and val is None and len(held):
        log.warning(
            "%s chooses %s on validation data. There are none, so %d of %d shots are held back for it; give val=... to "
            "train on all.",
            *(learner.title(), " and ".join(learner.chooses), len(held), len(train)),
        )
        train_on, choose_on = kept, held

    if learner.solves or not (learner.learned_parameters() or learner.prepares):
        return AutomaticRecipe({}, train_on, choose_on, {})
    if _is_papers(learner) or len(recipe.factors) == 1:
        return AutomaticRecipe(paper_options(learner, train), train_on, choose_on, {})

    base = {key: value for key, value in recipe.train.items() if key not in _ELSEWHERE}
    base |= {"grad_clip": 1.0, "schedule": "cosine", "warmup_epochs": 0.0}
    base["batch_size"] = min(32, int(recipe.train.get("batch_size", 32)) * 4, len(kept))
    paper_rate = float(recipe.train.get("lr", 0.002))

    search = _Search(
        learner, kept, held, seed, cache, fit, {**base, **_epochs(recipe.trial_steps, base, kept)}
    )
    rate = search.best([paper_rate * factor for factor in recipe.factors])
    if rate is None:  # no class has a sample to spare, or every rate diverged
        rate = paper_rate * recipe.factors[len(recipe.factors) // 2]

    options = {**base, **_epochs(recipe.steps, base, train_on), "lr": rate}
    return AutomaticRecipe(options, train_on, choose_on, {"recipe/lr": rate, **search.figures(rate)})


def paper_options(learner: Learner, train: ImageDataset) -> dict[str, Any]:
    """Return the training options of the learner's paper for these samples."""
    shots = int(np.bincount(train.labels).max())
    return learner.recipe.paper_options(shots)


def hold_back(train: ImageDataset, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Split the shots of every class: the larger part to train on, a quarter (at least one) to choose on.

    A class with a single sample keeps it.
    """
    labels = np.asarray(train.labels)
    held: list[int] = []
    for label in range(len(train.classnames)):
        members = np.flatnonzero(labels == label)
        count = 0 if len(members) < 2 else max(1, len(members) // _HELD_BACK)
        order = numpy_rng(seed, "held-back shots", label).permutation(len(members))
        held += [int(i) for i in members[order[:count]]]

    chosen = set(held)
    return train.subset(i for i in range(len(train)) if i not in chosen), train.subset(sorted(held))


class _Search:
    """Trials of learning rates, each scored on the shots that were held back."""

    def __init__(
        self,
        learner: Learner,
        kept: ImageDataset,
        held: ImageDataset,
        seed: int,
        cache: FeatureCache,
        fit: Train,
        options: Mapping[str, Any],
    ) -> None:
        self.learner = learner
        self.kept = kept
        self.held = held
        self.seed = seed
        self.cache = cache
        self.fit = fit
        self.options = options
        self.scores: dict[float, dict[str, float]] = {}

    def best(self, rates: list[float]) -> float | None:
        """Return the best of some rates and of two between it and its neighbours; None if there is nothing to go by."""
        if not len(self.held):
            return None

        for rate in rates:
            self._try(rate)
        if not self.scores:
            return None

        middle = self._ranked()[0]
        for rate in (middle / _REFINEMENT, middle * _REFINEMENT):
            self._try(rate)
        return self._ranked()[0]

    def figures(self, rate: float) -> dict[str, float]:
        """Return what the rate reached on the held-back shots, beside zero-shot; say so if zero-shot is better."""
        if rate not in self.scores:
            return {}

        learner = self.learner
        zero_shot = create_learner("zero_shot", learner.backbone, learner.classnames, learner.templates)
        baseline = evaluate(zero_shot, self.held, cache=self.cache)["accuracy"]
        reached = self.scores[rate]["accuracy"]

        if reached < baseline:
            log.warning(
                "%s: on the %d shots that were held back it reaches %.1f %%, zero-shot %.1f %%. More shots, or a start "
                "from the hand-written sentence, may help; zero_shot may be the better choice here.",
                *(learner.title(), len(self.held), 100 * reached, 100 * baseline),
            )
        return {"recipe/accuracy": reached, "recipe/zero_shot_accuracy": baseline}

    def _try(self, rate: float) -> None:
        trial = self.learner.with_classes(self.learner.classnames, self.learner.templates)
        trial.train()
        try:
            # Only what is chosen at the end needs the held-back shots, so nothing is validated on the way.
            changes = {**self.options, "lr": rate, "eval_every": self.options["epochs"]}
            with _without_warnings():
                self.fit(trial, self.kept, self.held, changes)
                scores = evaluate(trial, self.held, cache=self.cache)
        except NonFiniteError:  # a rate at which training overflows is no candidate
            return

        self.scores[rate] = scores
        log.debug("%s: rate %g reaches %s on held-back shots", trial.title(), rate, scores)

    def _ranked(self) -> list[float]:
        """Return the rates, the best first: by accuracy, then negative log likelihood; several labels: by mean AP."""
        return sorted(
            self.scores,
            key=lambda rate: [
                -self.scores[rate].get("map", 0.0),
                -self.scores[rate]["accuracy"],
                self.scores[rate].get("nll", 0.0),
            ],
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out the warnings of a trial: they speak of a rate that nobody asked for."""
    ours = logging.getLogger("vlprompt")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(level)


def _is_papers(learner: Learner) -> bool:
    """Return whether the backbone is one that papers used: a CLIP of OpenAI."""
    fingerprint = learner.backbone.fingerprint
    name = str(fingerprint.get("architecture", "")).removesuffix("-quickgelu")
    return name in PAPER_BACKBONES and fingerprint.get("pretrained") == "openai"


def _epochs(steps: int, options: Mapping[str, Any], train: ImageDataset) -> dict[str, int]:
    """Return ``epochs`` that make about so many steps."""
    per_epoch = max(1, len(train) // int(options["batch_size"]))
    return {"epochs": max(1, round(steps / per_epoch))}
