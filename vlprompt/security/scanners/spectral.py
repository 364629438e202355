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
from vlprompt.metrics.verdicts import Verdicts
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

    needs_whole_set = True

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

    def judge(self, rows: Tensor) -> Verdicts:
        """Refuse: a single image has no signature."""
        raise DataError("spectral signatures judge a whole labelled data set, not single images.")

    def judge_set(self, rows: Tensor, labels: Tensor) -> Verdicts:
        """See :meth:`ImageScanner.judge_set`."""
        score = torch.zeros(len(rows))
        for label in labels.unique():
            members = (labels == label).nonzero()[:, 0]
            if len(members) < 2:
                continue

            centred = rows[members].double() - rows[members].double().mean(0)
            direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
            order = (centred @ direction).square().argsort()
            score[members[order]] = torch.arange(len(members)).float() / (len(members) - 1)

        return Verdicts(score)
