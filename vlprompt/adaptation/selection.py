"""Selection of the views that an adaptation uses: by rank, never by threshold.

Every function takes all views at once and returns a mask. The number of kept views is ``max(1, floor(share * count))``,
as published, except that at least one view is kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cosine_then_entropy", "entropies", "keep_count", "lowest_entropy", "parallel_filters"]


def keep_count(share: float, count: int) -> int:
    """Return how many of ``count`` views a share in (0, 1] keeps (6 of 64 at 0.1)."""
    # 0.29 * 100 is 28.999... in floating point.
    return max(1, math.floor(share * count + 1e-9))


def entropies(logits: Tensor) -> Tensor:
    """Return (..., V) entropies in nats of (..., V, C) logits."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def lowest_entropy(logits: Tensor, share: float) -> Tensor:
    """Return a (..., V) mask of the most confident views (TPT, Shu et al., NeurIPS 2022, section 3.2).

    Args:
        logits: (..., V, C).
        share: In (0, 1].
    """
    views = logits.shape[-2]
    count = keep_count(share, views)
    if count == views:
        return torch.ones_like(logits[..., 0], dtype=torch.bool)
    return _smallest(entropies(logits), count)


def cosine_then_entropy(logits: Tensor, vectors: Tensor, cosine_share: float, entropy_share: float) -> Tensor:
    """Return a (..., V) mask: views like the image, and of those (and the image) the confident ones.

    The rule of DiffTPT's code: views 1 .. V-1 are ranked by their cosine with view 0 and the best share is
    kept, view 0 joins them, and of all these the share with the lowest entropy stays (view 0 may drop out):
    128 views give 101 + 1, then 30 at shares of 0.8 and 0.3.

    Args:
        logits: (..., V, C).
        vectors: (..., V, D) that are compared.
        cosine_share: In (0, 1].
        entropy_share: In (0, 1].
    """
    views = logits.shape[-2]
    if views == 1:
        return torch.ones_like(logits[..., 0], dtype=torch.bool)

    near = _smallest(-_cosine_with_first(vectors), keep_count(cosine_share, views - 1))
    # View 0 is compared with nothing, and joins those that passed.
    near = torch.cat([torch.ones_like(near[..., :1]), near], dim=-1)

    count = keep_count(entropy_share, keep_count(cosine_share, views - 1) + 1)
    return _smallest(entropies(logits).masked_fill(~near, torch.inf), count)


def parallel_filters(
    logits: Tensor, vectors: Tensor, generated: int, cosine_share: float, entropy_share: float
) -> Tensor:
    """Return a (..., V) mask: standard views by entropy, generated ones by entropy and by cosine, then merged.

    The rule of DiffTPT's paper (Feng et al., ICCV 2023, section 3.3): both filters look at all generated views, and
    a generated view stays if it passes both.

    Args:
        logits: (..., V, C), the generated views last.
        vectors: (..., V, D) that are compared with view 0.
        generated: Number of generated views.
        cosine_share: In (0, 1], of the generated views.
        entropy_share: In (0, 1], of the standard views, and of the generated ones.
    """
    standard = logits.shape[-2] - generated
    mask = lowest_entropy(logits[..., :standard, :], entropy_share)
    if not generated:
        return mask

    confident = lowest_entropy(logits[..., standard:, :], entropy_share)
    cosine = _cosine_with_first(vectors)[..., standard - 1 :]
    # Both filters look at all generated views, so fewer than either share may pass both, even none.
    near = _smallest(-cosine, keep_count(cosine_share, generated))
    return torch.cat([mask, confident & near], dim=-1)


def _cosine_with_first(vectors: Tensor) -> Tensor:
    """(..., V - 1) cosines of the other rows with row 0."""
    return F.cosine_similarity(vectors[..., :1, :], vectors[..., 1:, :], dim=-1)


def _smallest(scores: Tensor, count: int) -> Tensor:
    """(..., V) mask of the ``count`` smallest scores; of equal ones the first."""
    best = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
