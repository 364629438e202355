"""Zero-shot: sentences that say what a trigger looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.data.triggers import trigger_words
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["ZeroShotTriggers"]


@SCANNERS.register(
    "zero_shot", summary="sentences that describe triggers, nothing learned", paper="2103.00020"
)
class ZeroShotTriggers(Scanner):
    """Compares an image with "a photo of a OBJECT." and "a photo of a OBJECT with a TRIGGER.", for every composition.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`; the words of each trigger are used.
    """

    names_objects = True

    def __init__(self, backbone: Backbone, classnames: Sequence[str], triggers: Sequence[str]) -> None:
        super().__init__(backbone, classnames, triggers)
        endings = ["", *(f" with a {words}" for words in trigger_words(self.triggers)[1:])]
        texts = [f"a photo of a {name}{ending}." for ending in endings for name in self.classnames]
        self.weights = backbone.encode_text(texts)  # (T C, d)

    def judge(self, rows: Tensor) -> Verdicts:
        """See :meth:`ImageScanner.judge`."""
        features = F.normalize(rows.to(self.weights), dim=-1)
        logits = self.backbone.logit_scale * features @ self.weights.T
        composition = logits.unflatten(1, (len(self.triggers), -1)).cpu()
        probs = composition.flatten(1).softmax(-1).view_as(composition)
        trigger = probs.sum(2)
        score = torch.clamp(1 - trigger[:, 0], min=0)

        return Verdicts(score, trigger, probs.sum(1), composition)
