"""VPT for segmentation: tokens in the image tower, shallow or deep.

Paper: Jia et al., ECCV 2022, arXiv 2203.12119, section 3; for segmentation: TuneVLSeg, ACCV 2024, arXiv 2410.05239.
As there, and unlike the VPT paper, tokens are appended at the end of the sequence and before the pre-norm, and start
from N(0, 0.02^2). Rows above a model's last tap change nothing (CLIPSeg reads 10 of 12 blocks).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies.base import Rows, Strategy, checked_depth, random_rows

__all__ = ["VisualPromptTuning"]


@STRATEGIES.register("vpt", summary="tokens in the image tower, shallow or deep", paper="2203.12119")
class VisualPromptTuning(Strategy):
    """Learns (J, M, Dv) tokens.

    Args:
        backbone: See :class:`Strategy`.
        depth: J, layers with tokens of their own.
        context_length: M, tokens per layer.
        seed: Of the start values.
    """

    prompts_vision: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        depth: Annotated[int, Field(ge=1)] = 1,
        context_length: Annotated[int, Field(ge=1, le=256)] = 4,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone)
        checked_depth(depth, backbone.vision.layers)
        self.context = nn.Parameter(
            random_rows((depth, context_length, backbone.vision.width), seed)
        )  # (J, M, Dv)

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`."""
        return Rows(vision=self.context)
