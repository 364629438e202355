"""Scores of how known an image looks; the higher, the more likely it shows one of the classes.

Sources: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017
    (``msp``); Ming et al., "Delving into Out-of-Distribution Detection with Vision-Language Representations", NeurIPS
    2022 (``mcm``); Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020 (``energy``).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["known_scores"]


def known_scores(probs: Tensor, similarities: Tensor | None, temperature: float = 1.0) -> dict[str, Tensor]:
    """Return scores by name, (B,) each.

    Args:
        probs: (B, C) probabilities.
        similarities: (B, C) cosines of images and classes; None gives ``msp`` alone.
        temperature: Of the softmax over cosines, as in the published code of MCM; cosines are not scaled.
    """
    scores = {"msp": probs.amax(-1)}
    if similarities is None:
        return scores

    scaled = similarities / temperature
    soft = scaled.softmax(-1)
    scores["mcm"] = soft.amax(-1)
    scores["max_logit"] = similarities.amax(-1)
    scores["energy"] = temperature * scaled.logsumexp(-1)
    scores["neg_entropy"] = (soft * scaled.log_softmax(-1)).sum(-1)
    scores["variance"] = soft.var(-1, correction=0)
    return scores
