"""Tent: scales and shifts of the image tower's normalisation layers are tuned until predictions are certain.

Paper: Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021, arXiv 2006.10726, section 3.

The paper tunes batch normalisation of networks trained on the classes themselves, without forgetting. Papers that
compare with "Tent" on CLIP mean different things: ten steps of Adam at 0.001, forgotten after each batch (as here by
default), or one step of SGD at 0.00025 that lasts (``optimizer: sgd, lr: 2.5e-4, steps: 1, reset_scope: never``). Say
which.
"""

from __future__ import annotations

from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._norm_tuning import Batch, NormAdapter, NormRule, Optimizer, Steps
from vlprompt.adaptation._tuning import Rate
from vlprompt.adaptation.base import ResetScope
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.learners import Learner

__all__ = ["Tent"]


@ADAPTERS.register(
    "tent",
    summary="tunes normalisation layers of the image tower on batches, towards certain predictions",
    paper="2006.10726",
    needs=("image gradients",),
)
class Tent(NormAdapter):
    """Minimise the mean entropy of a batch's predictions.

    Args:
        learner: See :class:`NormAdapter`.
        batch: See :class:`NormAdapter`.
        steps: Updates per batch.
        lr: Learning rate.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        weight_decay: Of all optimisers.
        reset_scope: See :class:`NormAdapter`.
        updates_first: See :class:`NormAdapter`.
        batch_statistics: See :class:`NormAdapter`.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        batch: Batch = 128,
        steps: Steps = 10,
        lr: Rate = 1e-3,
        optimizer: Optimizer = "adam",
        weight_decay: Rate = 0.0,
        reset_scope: ResetScope = "batch",
        updates_first: bool = True,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__(
            learner,
            NormRule(steps, lr, optimizer, weight_decay=weight_decay),
            batch=batch,
            reset_scope=reset_scope,
            updates_first=updates_first,
            batch_statistics=batch_statistics,
        )

    def loss(self, images: Tensor, step: int) -> Tensor:
        """See :meth:`NormAdapter.loss`."""
        return marginal_entropy(self.logits(images)[:, None]).mean()
