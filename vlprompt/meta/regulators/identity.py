"""R0: nothing is regulated, so meta-training is plain first-order MAML (Finn et al., ICML 2017, section 5.2)."""

from __future__ import annotations

from torch import Tensor

from vlprompt.meta.regulators import REGULATORS, Regulator, Situation

__all__ = ["Identity"]


@REGULATORS.register("identity", summary="R0: the gradient as it is (plain MAML), the ablation")
class Identity(Regulator):
    """Has no parameters."""

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """See :meth:`Regulator.regulate_one`."""
        return gradient
