"""What all methods that tune prompts per image share: encode, select, tune, predict the image itself, forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprompt.adaptation._tuning import Answers, Rule, Tuner
from vlprompt.adaptation.base import Adapted, Adapter, EncodedViews
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import lowest_entropy
from vlprompt.adaptation.views import ViewPlan
from vlprompt.backbones import Backbone
from vlprompt.learners import Learner, create_learner

__all__ = ["PromptAdapter"]


class PromptAdapter(Adapter):
    """Base of methods that tune prompts on one image; a method overrides :meth:`select` or :meth:`loss`.

    If adaptation starts from a learner with prompts (CoOp, MaPLe, ...), everything that it learned is tuned; if its
    prompts are in the image tower, the kept views run through the tower again. If it starts from a backbone, the words
    before the class name are tuned.

    Args:
        learner: See :class:`Adapter`.
        plan: How views are made.
        rule: How prompts move.
        share: Share of the views that are used, the most confident ones.
        together: Images whose later passes share one run of the text tower.

    Raises:
        DataError: If the learner has no prompts.

    Attributes:
        answers: What answers under tuned prompts; with ``"views"`` a method overrides :meth:`answer`.
    """

    answers: ClassVar[Answers] = "image"

    def __init__(self, learner: Learner, plan: ViewPlan, rule: Rule, share: float, together: int) -> None:
        super().__init__(learner, plan)
        self.share = share
        self.together = together
        self.optimizer = rule.optimizer
        self.tuner = Tuner(learner, self.loss, rule, self.answers)
        # Prompts inside the image tower change what it sees, so an embedding from before the step is of no use.
        self.needs_pixels = not learner.static_images

    @classmethod
    def start(
        cls,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        options: Mapping[str, Any],
    ) -> Learner:
        """Return the sentences "<init> <class name>." with the words of ``init`` as learned context."""
        init = options.get("init") or "a photo of a"
        return create_learner("coop", backbone, classnames, templates, init=init)

    def loss(self, logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """Return (G,) values to minimise (see :data:`vlprompt.adaptation._tuning.Loss`)."""
        return marginal_entropy(logits, mask)

    def select(self, logits: Tensor, embeddings: Tensor, generated: int) -> Tensor:
        """Return the (G, V) mask of views that are used, from the logits before the first step.

        Args:
            logits: (G, V, C).
            embeddings: (G, V, d), not normalised.
            generated: How many of the V views, the last ones, were generated.
        """
        return lowest_entropy(logits, self.share)

    def answer(self, logits: Tensor, embeddings: Tensor) -> Tensor:
        """Return the (G, C) logits of images from what :attr:`answers` gave under tuned prompts.

        Args:
            logits: (G, C) of view 0, or (G, V, C) of all views.
            embeddings: (G, V, d) before tuning, not normalised.
        """
        return logits

    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        logits = self.view_logits(views.embeddings)
        mask = self.select(logits, views.embeddings, views.generated)
        if self.needs_pixels:
            return self._adapted(self.tune_pixels(views.pixels, mask), views.embeddings, mask)

        # The text tower runs for a few images together: prompts of all of them at once would not fit into memory.
        tuned = []
        embeddings = views.embeddings.split(self.together)
        for part, rows in zip(embeddings, mask.split(self.together), strict=True):
            tuned.append(self.tuner.tune(part, rows).logits)
        return self._adapted(torch.cat(tuned), views.embeddings, mask)

    def _adapted(self, tuned: Tensor, embeddings: Tensor, mask: Tensor) -> Adapted:
        logits = self.answer(tuned, embeddings)
        return Adapted(logits.softmax(-1), mask, logits / self.backbone.logit_scale)

    def tune_pixels(self, pixels: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """Return what :attr:`answers` gives after tuning prompts that enter the image tower (see :meth:`answer`)."""
        return self.tuner.tune_through_images(pixels, mask).logits
