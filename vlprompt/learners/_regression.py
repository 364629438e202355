"""Logistic regression by scikit-learn: L-BFGS with an L2 penalty, as the probes solve it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Regression", "regress"]


class Regression(NamedTuple):
    """What was found.

    Attributes:
        classes: (K,) labels that occur, ascending.
        weight: (K, d).
        bias: (K,).
    """

    classes: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Return (N,) labels of (N, d) features."""
        return self.classes[(features @ self.weight.T + self.bias).argmax(-1)]


def regress(features: Tensor, labels: Tensor, strength: float, max_iter: int) -> Regression:
    """Solve one regression.

    Args:
        features: (N, d) on the CPU; the solution has their type.
        labels: (N,) of at least two classes.
        strength: log10 of C, the inverse weight of the penalty.
        max_iter: L-BFGS iterations; that they may not be enough is part of the published protocol.
    """
    # Here, not above: importing scikit-learn takes half a second, and every learner is imported with this one.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=10.0**strength, max_iter=max_iter)
        model.fit(features.numpy(), labels.numpy())

    classes = torch.from_numpy(model.classes_).long()
    weight = torch.from_numpy(model.coef_).to(features.dtype)
    bias = torch.from_numpy(model.intercept_).to(features.dtype)
    if len(classes) == 2:  # scikit-learn returns one row for two classes
        weight = torch.cat([-weight / 2, weight / 2])
        bias = torch.cat([-bias / 2, bias / 2])
    return Regression(classes, weight, bias)
