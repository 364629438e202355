"""Zero-shot: sentences that say what a trigger looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners._judgement import Judgement
from vlprompt.security.scanners import SCANNERS, Scanner
from vlprompt.security.triggers import trigger_words

__all__ = ["ZeroShotTriggers"]


@SCANNERS.register(
    "zero_shot", summary="sentences that describe triggers, nothing learned", paper="2103.00020"
)
class ZeroShotTriggers(Scanner):
    """Compares an image with "a photo of a OBJECT." and "a photo of a OBJECT with a TRIGGER." for every pair.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`; each trigger's own words are used.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str], triggers: Sequence[str]) -> None:
        super().__init__(backbone, classnames, triggers)
        endings = ["", *(f" with a {words}" for words in trigger_words(self.triggers)[1:])]
        texts = [f"a photo of a {name}{ending}." for ending in endings for name in self.classnames]
        self.weights = backbone.encode_text(texts)

    def judge(self, embeddings: Tensor) -> Judgement:
        """See :meth:`Scanner.judge`."""
        features = F.normalize(embeddings.to(self.weights), dim=-1)
        pairs = (
            (self.backbone.logit_scale * features @ self.weights.T)
            .unflatten(1, (len(self.triggers), -1))
            .cpu()
        )
        probs = pairs.flatten(1).softmax(-1).view_as(pairs)
        trigger = probs.sum(2)
        return Judgement(torch.clamp(1 - trigger[:, 0], min=0), trigger, probs.sum(1), pairs)
