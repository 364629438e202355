"""What all methods that tune prompts per image share: encode, select, tune, predict the image itself, forget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlprompt.adaptation._tuning import Rule, Tuner
from vlprompt.adaptation.base import Adapter, EncodedViews
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import lowest_entropy
from vlprompt.adaptation.views import ViewPlan
from vlprompt.backbones import Backbone
from vlprompt.learners import Learner, create_learner

__all__ = ["PromptAdapter"]


class PromptAdapter(Adapter):
    """Base of methods that tune prompts on one image; a method overrides :meth:`select` or :meth:`loss`.

    From a learner with prompts (CoOp, MaPLe, ...) everything it learned is tuned; prompts in the image tower make
    the kept views run through it again. From a backbone, the words before the class name are.

    Args:
        learner: See :class:`Adapter`.
        plan: How views are made.
        rule: How prompts move.
        share: Of the views that are listened to, the most confident ones.
        together: Images whose later passes share one run of the text tower.

    Raises:
        DataError: If the learner has no prompts.
    """

    def __init__(self, learner: Learner, plan: ViewPlan, rule: Rule, share: float, together: int) -> None:
        super().__init__(learner, plan)
        self.share, self.together, self.optimizer = share, together, rule.optimizer
        self.tuner = Tuner(learner, self.loss, rule)
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

    def loss(self, logits: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
        """Return (G,) values to minimise (see :data:`vlprompt.adaptation._tuning.Loss`)."""
        return marginal_entropy(logits, kept)

    def select(self, logits: Tensor, embeddings: Tensor, generated: int) -> Tensor:
        """Return the (G, V) mask of views to listen to, from the logits before the first step.

        Args:
            logits: (G, V, C).
            embeddings: (G, V, d), not normalised.
            generated: How many of the V views, the last ones, were generated.
        """
        return lowest_entropy(logits, self.share)

    def adapt(self, views: EncodedViews) -> tuple[Tensor, Tensor]:
        """See :meth:`Adapter.adapt`."""
        logits = self.view_logits(views.embeddings)
        kept = self.select(logits, views.embeddings, views.generated)
        if self.needs_pixels:
            return self.tune_pixels(views.pixels, kept).softmax(-1), kept
        parts = zip(views.embeddings.split(self.together), kept.split(self.together), strict=True)
        tuned = [self.tuner.tune(part, mask).logits for part, mask in parts]
        return torch.cat(tuned).softmax(-1), kept

    def tune_pixels(self, pixels: tuple[Tensor, ...], kept: Tensor) -> Tensor:
        """Return (G, C) logits of view 0 after tuning prompts that enter the image tower."""
        return self.tuner.tune_through_images(pixels, kept).logits
