"""MaPLe for segmentation: text prompts in every layer, and visual prompts that are projections of them.

Paper: Khattak et al., CVPR 2023, arXiv 2210.03117, section 3.2; for segmentation: TuneVLSeg, ACCV 2024, arXiv
2410.05239. Where this differs from TuneVLSeg's code: the final norm's gain starts at 0.02, the size of random context.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies._projection import Hidden, Projections, projection
from vlprompt.segmentation.strategies.base import Rows, checked_depth
from vlprompt.segmentation.strategies.coop import CoOp

__all__ = ["MaPLe"]


@STRATEGIES.register(
    "maple", summary="text prompts and their projections into the image tower", paper="2210.03117"
)
class MaPLe(CoOp):
    """Learns (J, M, Dt) context and J projections into the image tower.

    Args:
        backbone: See :class:`CoOp`.
        depth: See :class:`CoOp`; in both towers.
        context_length: See :class:`CoOp`.
        init: See :class:`CoOp`.
        intermediate_dim: Widths inside the projections; None: one linear layer, as in the MaPLe paper (with norm off).
        low_rank: Two linear layers without activation.
        norm: Norm the visual prompts.
        shared: One projection for all layers.
        seed: See :class:`CoOp`.
    """

    prompts_vision: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        depth: Annotated[int, Field(ge=1)] = 1,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        intermediate_dim: Hidden = 64,
        low_rank: bool = False,
        norm: bool = True,
        shared: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, depth=depth, context_length=context_length, init=init, seed=seed)
        text = backbone.text
        vision = backbone.vision
        checked_depth(depth, text.layers, vision.layers)

        with seeded_modules(seed, "segmentation", "projection"):
            self.projections = Projections(
                [
                    projection(text.width, vision.width, intermediate_dim, low_rank=low_rank, norm=norm)
                    for _ in range(1 if shared else depth)
                ]
            )

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`."""
        return Rows(text=self.context, vision=self.projections(self.context))
