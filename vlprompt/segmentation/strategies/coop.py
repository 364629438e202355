"""CoOp for segmentation: learned context before the phrase, shallow or deep.

Paper: Zhou et al., IJCV 2022, arXiv 2109.01134, section 3.2; for segmentation: TuneVLSeg, ACCV 2024, arXiv 2410.05239.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies.base import Rows, Strategy, checked_depth, text_rows

__all__ = ["CoOp"]


@STRATEGIES.register("coop", summary="context words before the phrase, shallow or deep", paper="2410.05239")
class CoOp(Strategy):
    """Learns (J, M, Dt) context.

    Args:
        backbone: See :class:`Strategy`.
        depth: J, layers with prompts of their own.
        context_length: M, if there is no ``init``.
        init: Phrase the first layer's context starts from; M becomes its number of tokens.
        seed: Of the other start values.
    """

    prompts_text: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        depth: Annotated[int, Field(ge=1)] = 1,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        seed: int = 1,
    ) -> None:
        super().__init__(backbone)
        checked_depth(depth, backbone.text.layers)
        self.context = nn.Parameter(text_rows(backbone, depth, context_length, init, seed))  # (J, M, Dt)

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`."""
        return Rows(text=self.context)
