"""A student that learns from a teacher and images without labels: what is checked, and what it reads."""

from __future__ import annotations

from dataclasses import replace

from vlprompt.classification.options import DistilOptions, StudyTrainSection
from vlprompt.core.errors import UnknownNameError
from vlprompt.data import ImageDataset, Sample
from vlprompt.learners import LEARNERS, Learner

__all__ = ["TRANSDUCTIVE", "distil_problems", "without_labels"]

TRANSDUCTIVE = "transductive"
"""What tables, records and pages call figures whose learner saw unlabelled images of the classes it is tested on."""

_ONE_TASK = ("coop-fewshot", "base-to-new", "elevater")


def without_labels(data: ImageDataset) -> ImageDataset:
    """Return a data set whose every image says class 0, so that no label can be learned from."""
    samples = tuple(Sample(sample.source, 0) for sample in data.samples)
    return replace(data, samples=samples, info={**data.info, "labels": "none"})


def distil_problems(
    options: DistilOptions, learner: str, protocol: str, train: StudyTrainSection
) -> list[str]:
    """Return what contradicts a teacher in a configuration."""
    if not options.teacher:
        return ["distil.data: without distil.teacher nothing reads it."] if options.data else []

    problems = []
    if protocol not in _ONE_TASK:
        problems.append(f"distil.teacher: {protocol} has no student; use one of {', '.join(_ONE_TASK)}.")
    if train.recipe != "none":
        problems.append(
            "train.recipe: no rate can be searched without labels; write train.recipe=none and train.lr."
        )
    if train.select == "best" or train.schedule == "plateau" or train.stop_patience is not None:
        problems.append(
            "train.select: a student has no labelled images to choose an epoch by; write select=last."
        )

    try:
        target = LEARNERS.get(learner).target
    except UnknownNameError:
        return problems  # said elsewhere
    if target.learn_from is Learner.learn_from:
        problems.append(f"learner.name: {learner} learns from labels, not from a teacher; use promptkd.")
    return problems
