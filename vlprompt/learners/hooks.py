"""The optional methods of a learner, beside those of everything that trains (:class:`vlprompt.core.trainable.Hooks`).

Every way of training calls them at the same points: ``fit``, ``fit_multitask``, a target stage. What a learner needs
to see arrives as :class:`TrainingSamples` or :class:`ValidationSamples`, one entry per task, so that a hook written for
one task works for several.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from vlprompt.core.trainable import Batch, Hooks, ParameterGroup, groups_by_rate
from vlprompt.data import ImageDataset

__all__ = ["LearnerHooks", "Samples", "TrainingSamples", "ValidationSamples", "overridden_hooks"]


class Samples(Protocol):
    """Labelled images of one task."""

    @property
    def learner(self) -> Any:
        """The classifier that is trained on them: the learner itself, or its twin with the task's classes."""

    @property
    def data(self) -> ImageDataset:
        """The images and their labels."""


class TrainingSamples(Samples, Protocol):
    """What a learner is about to be trained on."""

    @property
    def positions(self) -> Tensor:
        """(C,) where each class of ``data`` stands among the classes of ``learner``."""

    def first_epoch(self) -> Iterator[Batch]:
        """Yield the batches of the first epoch, with labels of ``data``."""

    def training_data(self) -> tuple[Tensor, Tensor]:
        """Return (V, n, d) embeddings of V augmented views of each image, and (n,) labels.

        A learner that takes several labels gets (n, C) of 1, 0 and -1 (unknown) where images can have several.
        """


class ValidationSamples(Samples, Protocol):
    """Samples to choose settings on."""

    def validation_data(self) -> tuple[Tensor, Tensor]:
        """Return (n, d) image embeddings and (n,) labels; (n, C) as in :meth:`TrainingSamples.training_data`."""


class LearnerHooks(Hooks):
    """Optional methods of learners: each does nothing.

    Attributes:
        prepares: True if :meth:`prepare` makes parameters out of the training samples, which is then called before
            training. Tasks can't share such parameters.
        solves: True if :meth:`solve` replaces training step by step. Tasks can't share the solution.
    """

    prepares: bool = False
    solves: bool = False

    def parameter_groups(self) -> list[ParameterGroup]:
        """See :meth:`Hooks.parameter_groups`: a part that is an :class:`OwnRate` learns at its own rate.

        A learner with two rates makes such a part a module of its own, or overrides this method where weight decay
        differs, too.
        """
        return groups_by_rate(self) if isinstance(self, nn.Module) else []

    @property
    def needs_survey(self) -> bool:
        """Whether training must not begin before :meth:`survey`."""
        return False

    @property
    def chooses(self) -> tuple[str, ...]:
        """Names of what :meth:`calibrate` chooses; a run without validation data warns that these stay as they are."""
        return ()

    def enter_folder(self, folder: Path | None, resume: bool) -> None:
        """Learn where the run keeps its files, before anything else is asked; only one process may write there.

        Args:
            folder: Of the run; None if nothing is to be written.
            resume: Whether an earlier, unfinished run in the folder is to go on.
        """

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """Make parameters out of the training samples, before anything is trained; only called if ``prepares``.

        Args:
            views: (V, N, d) embeddings of V augmented views of each training image.
            labels: (N,) class numbers.
        """

    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """Find all parameters at once; only called if ``solves``.

        Args:
            train: (V n, d) image embeddings and (V n,) labels: the n images' first view, then their second, and so on.
                (V n, C) where images can have several, and the learner takes them.
            val: (m, d) and (m,) or (m, C) of validation data, if there are any.
            seed: The run's seed.
            views: V. Views of an image are no independent samples, so what counts samples needs their number.

        Returns:
            What goes into the history of the run.
        """
        raise NotImplementedError

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """Look at the training samples before the first step.

        Args:
            sources: The samples of every task; one entry outside multitask training.
        """

    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """Choose after training what gradients do not choose; only called if there are validation data.

        See :attr:`chooses`.

        Args:
            sources: The validation samples of every task that has some.

        Returns:
            The choices; they become the metrics ``chosen/...``.
        """
        return {}

    def found_templates(self) -> tuple[str, ...]:
        """Return templates that were found for the class names; a run writes them down, and others can read them.

        Empty, for a learner that finds none.
        """
        return ()

    def figures(self) -> dict[str, float]:
        """Return numbers that describe what was learned; they become the metrics ``learned/...``."""
        return {}


def overridden_hooks(kind: type[LearnerHooks]) -> list[str]:
    """Return the names of the optional methods that a class has of its own."""
    names = []
    for base in (Hooks, LearnerHooks):
        for name, member in vars(base).items():
            does_nothing = inspect.getattr_static(LearnerHooks, name)
            if inspect.isfunction(member) and inspect.getattr_static(kind, name) is not does_nothing:
                names.append(name)
    return list(dict.fromkeys(names))
