"""DPC: a second copy of the tuned prompts learns to tell confusable classes apart; new classes keep the first.

Paper: Li et al., "DPC: Dual-Prompt Collaboration for Tuning Vision-Language Models", CVPR 2025, arXiv 2503.13443,
section 3.

Unlike the authors' code: both stages are one run; each image brings the most confusable classes that the batch does not
have yet, all of them chosen by the first prompts (theirs adds classes at random where too few are left, and never draws
the first and the last class); images of these classes come from the training images, not from a list of its own; two
images of one class are not each other's negatives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.core.trainable import Phase
from vlprompt.learners.base import Learner
from vlprompt.learners.hooks import TrainingSamples
from vlprompt.learners.plugins import PLUGINS
from vlprompt.learners.plugins._pool import ImagePool, gather
from vlprompt.learners.plugins._texts import require_texts
from vlprompt.learners.plugins.base import Plugin, with_embeddings

__all__ = ["DPC", "contrast"]

_FIRST, _SECOND = 0, 1
_LOSS = "dpc_contrast"
_TUNED = "tuned."


def contrast(logits: Tensor, labels: Tensor, apart: bool = True) -> Tensor:
    """Return the symmetric cross entropy of pairs of an image and its class (section 3.3).

    Args:
        logits: (n, n); row i has the scores of image i, column j those of the class of image j.
        labels: (n,) class numbers.
        apart: Whether pairs of one class leave each other out; False: they are each other's negatives.
    """
    if apart:
        same = labels[:, None] == labels
        logits = logits.masked_fill(
            same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device), -torch.inf
        )
    targets = torch.arange(len(labels), device=labels.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@PLUGINS.register(
    "dpc",
    summary="a second copy of the prompts, tuned on classes that are confused",
    paper="2503.13443",
)
class DPC(Plugin):
    """Two phases: the learner inside as it is; then a copy of it, by a contrast over images and classes of a batch.

    In the second phase each image brings K - 1 classes that the first prompts confuse it with, and an image of each.
    Classes that were all trained on are judged by the copy P', others by w P' + (1 - w) P, where P are the first
    prompts and w is ``new_weight``.

    Args:
        inner: A learner whose text tower gives one vector per class.
        share: Of the optimiser steps that the first phase gets.
        choices: K, classes that each image brings, its own among them.
        mix: What judges trained classes. ``copy``: P', as the authors' code does; ``mixture``: w P' + (1 - w) P with
            w = ``base_weight``, as the paper says.
        base_weight: w of trained classes, for ``mix: mixture``.
        new_weight: w of other classes; 0 keeps what the first phase says of them.
        duplicates: Pairs of one class in a batch: left out of each other's negatives, or ``negatives``, as published.
        rate: Multiple of the learning rate in the second phase. The authors' code trains w P' + (1 - w) P, in the same
            memory as P, which moves P' by 1 / w of the rate: 2 in their configurations of CoOp, 5 for w = 0.2.
        head_classes: Classes that the copy was tuned on; None: all. A learner that was brought to other classes has it.

    Raises:
        DataError: If it can't stand on that learner; says why.
    """

    plugin = "dpc"
    rank = 3

    def __init__(
        self,
        inner: Learner,
        *,
        share: Annotated[float, Field(ge=0, le=1)] = 0.5,
        choices: Annotated[int, Field(ge=1)] = 4,
        mix: Literal["copy", "mixture"] = "copy",
        base_weight: Annotated[float, Field(ge=0, le=1)] = 0.2,
        new_weight: Annotated[float, Field(ge=0, le=1)] = 0.0,
        duplicates: Literal["apart", "negatives"] = "apart",
        rate: Annotated[float, Field(gt=0)] = 1.0,
        head_classes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(inner)
        require_texts(self)
        if inner.phases():
            self.refuse("its training has phases of its own.")
        self.keep_head(head_classes)
        self.share = share
        self.choices = choices
        self.weight = new_weight
        if None not in self.head_places:
            self.weight = base_weight if mix == "mixture" else 1.0
        self.apart = duplicates == "apart"
        self.rate = rate

        self.tuned = self._copy()
        self._stage: int | None = None
        self._pool: ImagePool | None = None
        self._mixed: list[Learner] = []  # a list, so that it is no part of what is learned

    # --- who judges

    def judge(self) -> Learner:
        """Return the learner whose logits count: the first prompts, the copy, or their mixture."""
        if self._stage == _FIRST or self.weight == 0:
            return self.inner
        if self.weight == 1:
            return self.tuned
        if not self._mixed:
            self._mixed.append(self._mixture())
        return self._mixed[0]

    def embed_images(self, images: Tensor) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        return self.judge().embed_images(images)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        judge = self.judge()
        return judge.refined(judge.class_embeddings())

    def logits(self, embeddings: Tensor) -> Tensor:
        """See :meth:`Learner.logits`."""
        return self.judge().logits(embeddings)

    # --- training

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """See :meth:`LearnerHooks.survey`: remember images of every class.

        Raises:
            DataError: If there is more than one task.
        """
        self.inner.survey(sources)
        if len(sources) > 1:
            raise DataError(
                f"{self.title()} draws confusable classes from one task; {len(sources)} share this training."
            )
        self._pool = ImagePool.of(self.inner, sources[0])

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses inside in the first phase, the contrast in the second; outside of phases both."""
        if self._stage == _FIRST:
            return self.inner.loss(batch)

        contrasted = {_LOSS: self._contrast(batch)}
        return contrasted if self._stage == _SECOND else {**self.inner.loss(batch), **contrasted}

    def _contrast(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the contrast of a batch's images and of those of the classes that each is confused with."""
        labels = batch["label"]
        if self.static_images:
            batch = with_embeddings(self.inner, batch)  # the same for both copies

        pairs: Mapping[str, Tensor] = batch
        if self._pool is not None and self.choices > 1:
            extra = self.confusable(batch)
            labels = torch.cat([labels, extra])
            pairs = gather(batch, self._pool.draw(extra.tolist()), self.backbone.device)

        features = self.tuned.batch_embeddings(pairs)[:, : self.backbone.dim]
        weights = self.tuned.class_weights()[labels]
        logits = self.backbone.logit_scale * F.normalize(features, dim=-1) @ weights.T
        return contrast(logits, labels, self.apart)

    @torch.no_grad()
    def confusable(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the classes that a batch's images bring, each once: the likeliest wrong ones that it does not have.

        Fewer than K - 1 for each image, where the classes run out.
        """
        assert self._pool is not None
        order = (
            self.inner.logits(self.inner.batch_embeddings(batch)).argsort(dim=-1, descending=True).tolist()
        )
        taken = set(batch["label"].tolist())
        chosen: list[int] = []

        for ranking in order:
            free = [label for label in ranking if label not in taken and self._pool.has(label)]
            chosen += free[: self.choices - 1]
            taken |= set(free[: self.choices - 1])
        return torch.tensor(chosen, dtype=torch.long, device=batch["label"].device)

    def new_losses(self) -> frozenset[str]:
        """See :meth:`Plugin.new_losses`."""
        return frozenset({_LOSS})

    def phases(self) -> list[Phase]:
        """See :meth:`Hooks.phases`: the learner inside, then the copy."""
        first = tuple(name for name in self.learned_parameters() if not name.startswith(_TUNED))
        return [Phase(first, self.share), Phase(tuple(self.new_parameters()), 1 - self.share)]

    def enter_phase(self, number: int, is_new: bool) -> None:
        """See :meth:`Hooks.enter_phase`: the copy starts at what the first phase ended with."""
        self._stage = number
        if number == _SECOND and is_new:
            self._end_first()
        self.train(self.training)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """See :meth:`Hooks.after_epoch`: the learner inside counts the epochs of its own phase."""
        if self._stage == _FIRST:
            self.inner.after_epoch(epoch, max(epoch + 1, math.ceil(epochs * self.share)))

    def after_training(self) -> None:
        """See :meth:`Hooks.after_training`."""
        if self._stage != _SECOND:  # there were no steps for it
            self._end_first()
        self._stage = None
        self.train(self.training)

    def train(self, mode: bool = True) -> DPC:
        """See :meth:`Learner.train`; the learner inside is frozen in the second phase."""
        super().train(mode)
        if self._stage == _SECOND:
            self.inner.train(False)
        self._mixed = []
        if not mode:
            self.judge()  # a mixture is made now, not while a graph is traced
        return self

    def _end_first(self) -> None:
        self.inner.after_training()
        self.tuned.load_trainable_state(self.inner.trainable_state())

    # --- what is learned

    def new_state(self) -> dict[str, Tensor]:
        """See :meth:`Plugin.new_state`."""
        return {_TUNED + name: tensor for name, tensor in self.tuned.trainable_state().items()}

    def load_new_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Plugin.load_new_state`."""
        self.tuned.load_trainable_state({name.removeprefix(_TUNED): tensor for name, tensor in state.items()})
        self.train(self.training)

    def _copy(self) -> Learner:
        return self.inner.with_classes(self.classnames, self.templates)

    def _mixture(self) -> Learner:
        """Return a learner with w P' + (1 - w) P."""
        mixed = self._copy()
        first = self.inner.trainable_state()
        state = {
            name: torch.lerp(first[name], tensor, self.weight) if tensor.is_floating_point() else tensor
            for name, tensor in self.tuned.trainable_state().items()
        }
        mixed.load_trainable_state(state)
        return mixed.train(self.training)
