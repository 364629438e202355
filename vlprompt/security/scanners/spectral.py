"""Spectral signatures: outliers along the strongest direction of each class.

Paper: Tran et al., "Spectral Signatures in Backdoor Attacks", NeurIPS 2018, arXiv 1811.00636, algorithm 1; on CLIP's
    image embeddings instead of the victim's activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.learners._judgement import Judgement
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["SpectralSignatures"]


@SCANNERS.register(
    "spectral",
    summary="outliers along each class's first singular vector",
    paper="1811.00636",
    needs=("labels",),
)
class SpectralSignatures(Scanner):
    """Suspects, in every class, the 1.5 epsilon n images that reach farthest along the first singular vector.

    The score is an image's rank inside its class as a share, since lengths of different classes don't compare.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`; not used.
        rate: epsilon, an upper bound of the poisoned share of a class.
    """

    whole = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        triggers: Sequence[str],
        *,
        rate: Annotated[float, Field(gt=0, lt=0.6)] = 0.1,
    ) -> None:
        super().__init__(backbone, classnames, triggers)
        self._threshold = 1 - 1.5 * rate

    def judge(self, embeddings: Tensor) -> Judgement:
        """Refuse: a single image has no signature."""
        raise DataError("spectral signatures judge a whole labelled data set, not single images.")

    def judge_set(self, embeddings: Tensor, given: Tensor) -> Judgement:
        """See :meth:`Scanner.judge_set`."""
        score = torch.zeros(len(embeddings))
        for label in given.unique():
            rows = (given == label).nonzero()[:, 0]
            if len(rows) < 2:
                continue
            centred = embeddings[rows].double() - embeddings[rows].double().mean(0)
            direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
            order = (centred @ direction).square().argsort()
            score[rows[order]] = torch.arange(len(rows)).float() / (len(rows) - 1)
        return Judgement(score)
