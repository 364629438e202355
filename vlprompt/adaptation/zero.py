"""ZERO: the most confident views vote.

Paper: Farina et al., "Frustratingly Easy Test-Time Adaptation of Vision-Language Models", NeurIPS 2024,
    arXiv 2405.18330, section 3.3. A softmax of temperature 0 is a vote, so votes are counted.

Ties are broken by the views that come next in confidence, in the paper and in the published code. Where none of them
votes for a tied class, that code looks at the logits of the first of them, but leaves out the wrong classes (it counts
from the end), so that an untied class may win; here the most confident voter decides.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.base import Adapted, Adapter, EncodedViews
from vlprompt.adaptation.selection import entropies, keep_count
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["Zero", "count_votes"]


@ADAPTERS.register("zero", summary="a vote of the most confident views; no gradients", paper="2405.18330")
class Zero(Adapter):
    """Probabilities are shares of the votes of the most confident views.

    Args:
        learner: See :class:`Adapter`.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that vote, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        views: Annotated[int, Field(ge=1)] = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.3,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed))
        self.share = share

    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        logits = self.view_logits(views.embeddings)
        voters = keep_count(self.share, logits.shape[1])
        # Stable: of equally confident views the first comes first, so results do not depend on the sort.
        order = entropies(logits).argsort(dim=-1, stable=True)

        ballots = logits.argmax(-1).gather(1, order)  # (B, V), that of the most confident view first
        probs = torch.stack([count_votes(row, voters, logits.shape[-1]) for row in ballots])

        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :voters], True)
        return Adapted(probs, mask)


def count_votes(ballots: Tensor, voters: int, classes: int) -> Tensor:
    """Return the (C,) shares of votes.

    A tie goes to the tied class that a further view votes for first, or else to the tied class that the most confident
    voter votes for; the winner gets half a vote more.

    Args:
        ballots: (V,) classes, that of the most confident view first.
        voters: Number of views that vote, the first ones.
        classes: C.
    """
    # Half a vote settles a tie and never overtakes a class with more votes.
    votes = torch.bincount(ballots[:voters], minlength=classes).float()
    tied = votes == votes.max()
    if int(tied.sum()) > 1:
        order = torch.cat([ballots[voters:], ballots[:voters]])
        votes[order[tied[order]][0]] += 0.5
    return votes / votes.sum()
