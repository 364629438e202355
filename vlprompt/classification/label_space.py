"""Which classes images compete against: a learner's, a data set's, and how labels move from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from vlprompt.core.errors import DataError
from vlprompt.core.names import listed_names, match_classes
from vlprompt.core.options import check_type
from vlprompt.data import ImageDataset, Sample
from vlprompt.data.objects import dataset_of
from vlprompt.learners import Learner

__all__ = [
    "Named",
    "check_fitting",
    "check_learner",
    "dataset_for",
    "fitting",
    "in_learner_space",
    "known_classes",
]


class Named(Protocol):
    """What chooses among classes."""

    @property
    def classnames(self) -> Sequence[str]:
        """C names."""


def known_classes(learner: Named, data: ImageDataset) -> int:
    """Return how many classes of a data set a learner knows; capitals and the order don't count."""
    return sum(position is not None for position in match_classes(data.classnames, learner.classnames))


def in_learner_space(learner: Named, data: ImageDataset) -> ImageDataset:
    """Return a data set with a learner's class names and numbers.

    The data may have the same classes in another order or in capitals, or fewer of them.

    Raises:
        DataError: If the learner doesn't know one of its classes.
    """
    if data.classnames == tuple(learner.classnames):
        return data

    positions = match_classes(data.classnames, learner.classnames)
    unknown = [name for name, position in zip(data.classnames, positions, strict=True) if position is None]
    if unknown:
        raise DataError(
            f"{data.name} has {len(data.classnames)} classes, the learner {len(learner.classnames)}, and does not "
            f"know {listed_names(unknown)}. Use learner.with_classes(data.classnames), or --label-space data, to "
            "choose among the classes of the data."
        )

    known = [position for position in positions if position is not None]
    if len(known) == len(learner.classnames):
        order = sorted(range(len(known)), key=known.__getitem__)
        return replace(data.keep_classes(order), classnames=tuple(learner.classnames))

    samples = tuple(_moved(sample, known) for sample in data.samples)
    return replace(data, samples=samples, classnames=tuple(learner.classnames))


def check_learner(learner: Any) -> None:
    """Refuse what does not classify.

    Raises:
        DataError: Says what it is instead, and what is for segmentation models.
    """
    made_by = "vlprompt.create_learner(...) or vlprompt.load(...)"
    hint = "For segmentation models there are vlprompt.fit_segmenter and vlprompt.evaluate_segmenter."
    check_type(learner, Learner, "a learner", made_by, hint)


def dataset_for(learner: Named, data: Any, split: str) -> ImageDataset:
    """Return a data set of ours or of another library; one that doesn't name its classes has the learner's.

    Raises:
        DataError: See :func:`vlprompt.data.objects.dataset_of`.
    """
    if isinstance(data, ImageDataset):
        return data
    return dataset_of(data, split, fallback=learner.classnames)


def fitting(
    learner: Learner, data: ImageDataset, templates: Sequence[str] | None = None
) -> tuple[Learner, ImageDataset]:
    """Return a learner and a data set with the same classes, those of the data.

    A learner of other classes is moved to those of the data; one whose parameters belong to its classes can't be moved,
    so the data's labels are put into its order if the classes are the same.

    Args:
        learner: Of any classes.
        data: What it is scored on.
        templates: Of the data, for a learner that is moved; None keeps the learner's.

    Raises:
        DataError: If the learner can't be moved and its classes are others.
    """
    if learner.classnames == data.classnames:
        return learner, data
    is_permuted = known_classes(learner, data) == len(data.classnames) == len(learner.classnames)
    if learner.class_bound and is_permuted:
        return learner, in_learner_space(learner, data)
    return learner.with_classes(data.classnames, templates), data


def check_fitting(learner: Learner, data: ImageDataset) -> None:
    """Check before training that :func:`fitting` will be able to bring a learner and a data set together.

    Raises:
        DataError: If the learner's parameters will belong to its classes, and the data have others; names them.
    """
    if not learner.class_bound or set(match_classes(data.classnames, learner.classnames)) == set(
        range(len(learner.classnames))
    ):
        return
    raise DataError(
        f"{data.name} can't be scored after this training: its {len(data.classnames)} classes are not the "
        f"{len(learner.classnames)} of the training data, and {learner.method} learns one set of parameters per class. "
        f"Test on data with the same classes, or use a learner with shared context (coop with class_specific=false)."
    )


def _moved(sample: Sample, positions: Sequence[int]) -> Sample:
    labels = tuple(positions[label] for label in sample.classes)
    unknown = tuple(positions[label] for label in sample.unknown)
    return Sample(sample.source, labels if isinstance(sample.label, tuple) else labels[0], unknown)
