"""Learners whose parameters grow: one part for each session of incremental learning, of which the newest learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.names import check_classnames, listed_names, match_classes
from vlprompt.core.trainable import misfits
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner

__all__ = ["SessionLearner"]


class SessionLearner(Learner):
    """A learner with a part for each session; parts of earlier sessions are fixed, and belong to what is saved.

    A subclass makes a part for each entry of :attr:`sessions`, of parameters that :meth:`freeze_earlier` tells apart,
    and predicts each class by the part of its session (:meth:`parts_of_classes`). What it is asked for may be the
    classes of one session, of several or of all.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`.
        sessions: The classes of every session that there was, in order; None: these are the first one's.

    Attributes:
        sessions: Names by session.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        sessions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        parts = [self.classnames] if sessions is None else sessions
        self.sessions = tuple(tuple(check_classnames(part, "a session")) for part in parts)
        self.options["sessions"] = [list(part) for part in self.sessions]

    @property
    def takes_several_labels(self) -> bool:
        """See :attr:`Learner.takes_several_labels`."""
        return True

    def label_logits(self, logits: Tensor) -> Tensor:
        """See :meth:`Learner.label_logits`: every part has a bias of its own."""
        return logits

    def session_places(self) -> list[tuple[int, int] | None]:
        """Return for each class its session and its place in it; None for one that no session had."""
        where = [(s, c) for s, part in enumerate(self.sessions) for c in range(len(part))]
        places = match_classes(self.classnames, [name for part in self.sessions for name in part])
        return [None if place is None else where[place] for place in places]

    def freeze_earlier(self, parts: Sequence[torch.nn.Module]) -> None:
        """Let the last of the parts learn alone; called by the constructor with one module for each session."""
        for part in parts[:-1]:
            part.requires_grad_(False)

    def begin_session(self) -> None:
        """Give the newest part its start, when all earlier ones are in their places; here it keeps the one it has."""

    # --- what is learned, over all sessions

    def extend(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """See :meth:`Learner.extend`: one more part, for these classes alone; the others are fixed.

        Raises:
            DataError: If a class belongs to an earlier session.
        """
        known = [name for part in self.sessions for name in part]
        again = [
            c
            for c, place in zip(classnames, match_classes(classnames, known), strict=True)
            if place is not None
        ]
        if again:
            raise DataError(f"{self.title()} has learned {listed_names(again)} in an earlier session.")

        options = {**self.options, "sessions": [*self.options["sessions"], list(classnames)]}
        other = type(self)(self.backbone, classnames, templates or self.templates, **options)
        other.method = self.method
        other.to(self.backbone.device)

        with torch.no_grad():
            whole = other.trainable_state()
            for name, tensor in self.trainable_state().items():
                whole[name].copy_(tensor)
            other.begin_session()
        return other.train(self.training)

    def with_classes(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """See :meth:`Learner.with_classes`; where parts belong to their classes, any of those can be asked for."""
        if not self.class_bound:
            return super().with_classes(classnames, templates)

        known = [name for part in self.sessions for name in part]
        foreign = [c for c, p in zip(classnames, match_classes(classnames, known), strict=True) if p is None]
        if foreign:
            raise DataError(
                f"{self.title()} learned one set of parameters per class, so it can't name others than the "
                f"{len(known)} of its sessions: {listed_names(foreign)}. extend() learns them in one more session."
            )
        other = type(self)(self.backbone, classnames, templates or self.templates, **self.options)
        other.method = self.method
        other.to(self.backbone.device).load_trainable_state(self.trainable_state())
        return other.train(self.training)

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Trainable.trainable_state`: the parts of all sessions."""
        return {name: parameter.detach() for name, parameter in self._own_parameters().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`."""
        parameters = self._own_parameters()
        problems = misfits(parameters, state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")

        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])
        self._cached_weights = None

    def _own_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if not name.startswith("backbone.")}
