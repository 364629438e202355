"""A linear probe: clean against poisoned, on CLIP's image embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vlprompt.data import FeatureCache
from vlprompt.data.compositions import CompositionDataset
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["LinearProbeScanner"]

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


@SCANNERS.register(
    "linear_probe", summary="logistic regression, clean or not", paper="2103.00020", needs=("compositions",)
)
class LinearProbeScanner(Scanner):
    """Logistic regression with balanced classes; the strength of its regularisation is the best on validation."""

    def learn(
        self,
        train: CompositionDataset,
        val: CompositionDataset,
        cache: FeatureCache | None,
        seed: int,
        folder: Path | None,
    ) -> None:
        """See :meth:`Scanner.learn`: solve for every strength, and take the one with the largest AUROC."""
        x = self.rows(train, cache).numpy()
        self.mean = x.mean(0)
        self.spread = x.std(0) + 1e-6
        standardised = (x - self.mean) / self.spread
        val_standardised = (self.rows(val, cache).numpy() - self.mean) / self.spread
        poisoned = [int(trigger > 0) for trigger in train.trigger_labels]
        val_poisoned = [int(trigger > 0) for trigger in val.trigger_labels]

        best = -1.0

        for strength in _STRENGTHS:
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000)
            model.fit(standardised, poisoned)

            auroc = float(roc_auc_score(val_poisoned, model.decision_function(val_standardised)))
            if auroc > best:
                best = auroc
                self.model = model

    def learned(self) -> dict[str, Tensor]:
        """See :meth:`Scanner.learned`."""
        arrays = {
            "mean": self.mean,
            "spread": self.spread,
            "weights": self.model.coef_,
            "bias": self.model.intercept_,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def judge(self, rows: Tensor) -> Verdicts:
        """See :meth:`ImageScanner.judge`."""
        standardised = (rows.cpu().numpy() - self.mean) / self.spread
        return Verdicts(torch.from_numpy(self.model.predict_proba(standardised)[:, 1]).float())
