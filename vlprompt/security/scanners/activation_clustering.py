"""Activation clustering: a class whose images fall into a large and a small cluster.

Paper: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", SafeAI 2019, arXiv
    1811.03728, section 4; on CLIP's image embeddings instead of the victim's activations, with PCA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["ActivationClustering"]

_SMALLEST_CLASS = 4  # images; fewer make no two clusters worth comparing


@SCANNERS.register(
    "activation_clustering",
    summary="the smaller of two clusters in each class",
    paper="1811.03728",
    needs=("labels",),
)
class ActivationClustering(Scanner):
    """Cuts every class in two; a cluster with less than ``smallest`` of the class is suspected.

    The score is one minus the share of the class that is in the image's cluster.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`; not used.
        components: Dimensions that are kept before clustering.
        smallest: Share of a class below which a cluster is suspected.
        seed: Of the clusters' starts.
    """

    needs_whole_set = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        triggers: Sequence[str],
        *,
        components: Annotated[int, Field(ge=1)] = 10,
        smallest: Annotated[float, Field(gt=0, le=0.5)] = 0.35,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, triggers)
        self.components = components
        self.seed = seed
        self._threshold = 1 - smallest

    def judge(self, rows: Tensor) -> Verdicts:
        """Refuse: a single image makes no cluster."""
        raise DataError("activation clustering judges a whole labelled data set, not single images.")

    def judge_set(self, rows: Tensor, labels: Tensor) -> Verdicts:
        """See :meth:`ImageScanner.judge_set`."""
        score = torch.zeros(len(rows))
        for label in labels.unique():
            members = (labels == label).nonzero()[:, 0]
            if len(members) < _SMALLEST_CLASS:
                continue
            x = rows[members].cpu().numpy()
            reduced = PCA(min(self.components, *x.shape), random_state=self.seed).fit_transform(x)
            clusters = KMeans(2, n_init=5, random_state=self.seed).fit_predict(reduced)

            cluster = torch.from_numpy(clusters).long()
            share = cluster.bincount(minlength=2).double() / len(members)
            score[members] = (1 - share[cluster]).float()
        return Verdicts(score)
