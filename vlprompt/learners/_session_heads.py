"""Heads of incremental learners: a scale and a bias for each session, and class vectors from the texts or learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import torch_rng
from vlprompt.learners._sessions import SessionLearner
from vlprompt.learners.hooks import TrainingSamples

__all__ = ["HeadKind", "HeadedSessions", "orthonormal"]

HeadKind = Literal["text", "linear"]
_SURVEYED = 4  # batches that the start of the bias looks at


class _Head(nn.Module):
    """The head of one session.

    Args:
        scale: Of the cosine at the start.
        weight: (C_t, D) of a linear head; None with a text head.
        classes: C_t.
    """

    weight: nn.Parameter | None

    def __init__(self, scale: float, weight: Tensor | None, classes: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = nn.Parameter(torch.zeros(1 if weight is None else classes))
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))


class HeadedSessions(SessionLearner):
    """A logit is scale * cosine(feature, class vector) + bias, with scale and bias of the class's session.

    With a text head class vectors are the features of the sentences, and a class that no session had is named by the
    newest session; with a linear head they are learned, and the parameters belong to their classes.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; of the text head.
        sessions: See :class:`SessionLearner`.
        head: ``text`` or ``linear``.
        width: D of the features that a linear head reads.
        seed: Of the start of a linear head.

    Attributes:
        read_sessions: The sessions that the classes need, in order.
    """

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        sessions: Sequence[Sequence[str]] | None,
        head: HeadKind,
        width: int,
        seed: int,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions)
        self.class_bound = head == "linear"
        self.head = head

        parts = []
        for number, names in enumerate(self.sessions):
            rng = torch_rng(seed, "head", number)
            weight = torch.randn(len(names), width, generator=rng) / width**0.5 if head == "linear" else None
            parts.append(_Head(backbone.logit_scale, weight, len(names)))
        self.heads = nn.ModuleList(parts)
        self.freeze_earlier(parts)

        texts = backbone.class_weights(self.classnames, self.templates) if head == "text" else torch.zeros(0)
        self.register_buffer("texts", texts, persistent=False)

        self.places = [place or (len(parts) - 1, -1) for place in self.session_places()]
        self.read_sessions = sorted({session for session, _ in self.places})
        part_of = [self.read_sessions.index(session) for session, _ in self.places]
        self.register_buffer("part_of", torch.tensor(part_of), persistent=False)  # (C,) among read_sessions

    @property
    def newest(self) -> int:
        """The number of the session that learns."""
        return len(self.sessions) - 1

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`: those of the texts."""
        return self.get_buffer("texts") if self.head == "text" else super().class_embeddings()

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; those of a linear head are (C, D)."""
        if self.head == "text":
            return self.get_buffer("texts")
        weights = [self._head(session).weight for session, _ in self.places]
        rows = [w[row] for w, (_, row) in zip(weights, self.places, strict=True) if w is not None]
        return F.normalize(torch.stack(rows), dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, D) features, or of (B, T * D): one feature for each of :attr:`read_sessions`."""
        weights = self._weights()
        features = F.normalize(embeddings.unflatten(1, (-1, weights.shape[1])), dim=-1)
        cosines = torch.einsum("btd,cd->btc", features, weights)

        part_of = self.get_buffer("part_of")
        which = part_of if features.shape[1] > 1 else torch.zeros_like(part_of)
        cosines = cosines.gather(1, which.expand(cosines.shape[0], 1, -1)).squeeze(1)
        scales = torch.cat([self._head(number).log_scale for number in self.read_sessions]).exp()
        return scales[part_of] * cosines + self._biases()

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """See :meth:`LearnerHooks.survey`: the newest bias starts where the mean logit is 0."""
        if self.read_sessions != [self.newest]:
            return

        bias = self._head(self.newest).bias
        with torch.no_grad():
            bias.zero_()
            means = [
                self.batch_logits(batch).mean()
                for source in sources
                for batch in islice(source.first_epoch(), _SURVEYED)
            ]
            bias.fill_(-float(torch.stack(means).mean()))

    def _head(self, session: int) -> _Head:
        head = self.heads[session]
        assert isinstance(head, _Head)
        return head

    def _biases(self) -> Tensor:
        """Return (C,) biases: one for each session, or one for each class."""
        rows = [self._head(session).bias[row if self.head == "linear" else 0] for session, row in self.places]
        return torch.stack(rows)


def orthonormal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Return rows of unit length at right angles to each other, in every matrix of the last two axes."""
    *outer, rows, width = shape
    drawn = torch.randn(*outer, width, rows, generator=rng)
    return torch.linalg.qr(drawn).Q.transpose(-1, -2).contiguous()
