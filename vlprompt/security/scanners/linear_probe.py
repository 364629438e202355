"""A linear probe: clean against poisoned, on CLIP's image embeddings."""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vlprompt.data import FeatureCache
from vlprompt.learners._judgement import Judgement
from vlprompt.security.compositions import CompositionDataset
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["LinearProbeScanner"]

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@SCANNERS.register(
    "linear_probe", summary="logistic regression, clean or not", paper="2103.00020", needs=("pairs",)
)
class LinearProbeScanner(Scanner):
    """Logistic regression with balanced classes; the strength of its regularisation is the best on validation."""

    def learn(
        self, train: CompositionDataset, val: CompositionDataset, cache: FeatureCache | None, seed: int
    ) -> None:
        """Solve for every strength and keep the one with the largest AUROC."""
        x, val_x = (self.rows(data, cache).numpy() for data in (train, val))
        y, val_y = ([int(t > 0) for t in data.trigger_labels] for data in (train, val))
        self.mean, self.spread = x.mean(0), x.std(0) + 1e-6
        best = -1.0
        for strength in _STRENGTHS:
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000)
            model.fit((x - self.mean) / self.spread, y)
            score = float(roc_auc_score(val_y, model.decision_function((val_x - self.mean) / self.spread)))
            if score > best:
                best, self.model = score, model

    def judge(self, embeddings: Tensor) -> Judgement:
        """See :meth:`Scanner.judge`."""
        rows = (embeddings.cpu().numpy() - self.mean) / self.spread
        return Judgement(torch.from_numpy(self.model.predict_proba(rows)[:, 1]).float())
