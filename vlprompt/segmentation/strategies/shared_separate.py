"""Shared separate: narrow joint prompts, and one linear map into each tower.

Paper: TuneVLSeg, ACCV 2024, arXiv 2410.05239.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies._projection import Hidden, Projections, projection
from vlprompt.segmentation.strategies.base import Rows, Strategy, checked_depth, random_rows

__all__ = ["SharedSeparate"]


@STRATEGIES.register(
    "shared_separate", summary="narrow joint prompts mapped into both towers", paper="2410.05239"
)
class SharedSeparate(Strategy):
    """Learns (J, M, shared_dim) prompts and two maps per layer.

    Args:
        backbone: See :class:`Strategy`.
        depth: J, layers with prompts of their own, in both towers.
        context_length: M, tokens per layer and tower.
        shared_dim: Width of the joint prompts.
        intermediate_dim: Widths inside the maps; None: one linear layer each.
        low_rank: Two linear layers without activation.
        norm: Norm the prompts before they enter the towers.
        shared: The same two maps for all layers.
        seed: Of the start values.
    """

    prompts_text: ClassVar[bool] = True
    prompts_vision: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        depth: Annotated[int, Field(ge=1)] = 1,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        shared_dim: Annotated[int, Field(ge=1)] = 64,
        intermediate_dim: Hidden = None,
        low_rank: bool = False,
        norm: bool = False,
        shared: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone)
        text = backbone.text
        vision = backbone.vision
        checked_depth(depth, text.layers, vision.layers)
        self.context = nn.Parameter(
            random_rows((depth, context_length, shared_dim), seed)
        )  # (J, M, shared_dim)

        def maps_into(width: int) -> Projections:
            count = 1 if shared else depth
            networks: list[nn.Module] = []
            for _ in range(count):
                network = projection(shared_dim, width, intermediate_dim, low_rank=low_rank, norm=norm)
                networks.append(network)
            return Projections(networks)

        with seeded_modules(seed, "segmentation", "shared separate"):
            self.to_text = maps_into(text.width)
            self.to_vision = maps_into(vision.width)

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`."""
        return Rows(text=self.to_text(self.context), vision=self.to_vision(self.context))
