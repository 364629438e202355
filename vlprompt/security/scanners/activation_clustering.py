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
from vlprompt.learners._judgement import Judgement
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["ActivationClustering"]


@SCANNERS.register(
    "activation_clustering",
    summary="the smaller of two clusters in each class",
    paper="1811.03728",
    needs=("labels",),
)
class ActivationClustering(Scanner):
    """Cuts every class in two; a cluster with less than ``smallest`` of the class is suspected.

    The score is one minus the share of an image's own cluster.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`; not used.
        components: Dimensions that are kept before clustering.
        smallest: Share of a class below which a cluster is suspected.
        seed: Of the clusters' starts.
    """

    whole = True

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
        self.components, self.seed, self._threshold = components, seed, 1 - smallest

    def judge(self, embeddings: Tensor) -> Judgement:
        """Refuse: a single image makes no cluster."""
        raise DataError("activation clustering judges a whole labelled data set, not single images.")

    def judge_set(self, embeddings: Tensor, given: Tensor) -> Judgement:
        """See :meth:`Scanner.judge_set`."""
        score = torch.zeros(len(embeddings))
        for label in given.unique():
            rows = (given == label).nonzero()[:, 0]
            if len(rows) < 4:
                continue
            x = embeddings[rows].cpu().numpy()
            reduced = PCA(min(self.components, *x.shape), random_state=self.seed).fit_transform(x)
            cluster = torch.from_numpy(
                KMeans(2, n_init=5, random_state=self.seed).fit_predict(reduced)
            ).long()
            share = cluster.bincount(minlength=2).double() / len(rows)
            score[rows] = (1 - share[cluster]).float()
        return Judgement(score)
