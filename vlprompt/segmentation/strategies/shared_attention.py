"""Shared attention: one joint set of prompts, mixed by a transformer layer, then cut into text and visual ones.

Paper: TuneVLSeg, ACCV 2024, arXiv 2410.05239; after UPT (Zang et al. 2022, arXiv 2210.07225).
Where this differs from its code: prompt tokens attend to each other (there the batch axis and the sequence axis are
swapped, so that every token is a sequence of its own); both halves are computed together, once per step; one layer for
all depths by default.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies._projection import Projections
from vlprompt.segmentation.strategies.base import Rows, Strategy, checked_depth, random_rows

__all__ = ["SharedAttention"]


@STRATEGIES.register(
    "shared_attention", summary="joint prompts mixed by attention, then split", paper="2410.05239"
)
class SharedAttention(Strategy):
    """Learns (J, M, Dt + Dv) prompts and a transformer layer.

    Args:
        backbone: See :class:`Strategy`.
        depth: J, layers with prompts of their own, in both towers.
        context_length: M, tokens per layer and tower.
        attention_heads: Of the layer; None: the largest number up to 16 that divides Dt + Dv.
        feedforward: Width of the layer's MLP.
        attention_dropout: Inside the layer.
        norm_first: Norm before attention and MLP, not after.
        shared: One layer for all depths; otherwise one each, which is more than a ViT-B at depth 11.
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
        attention_heads: Annotated[int, Field(ge=1)] | None = None,
        feedforward: Annotated[int, Field(ge=1)] = 1536,
        attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25,
        norm_first: bool = True,
        shared: bool = True,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone)
        text = backbone.text
        vision = backbone.vision
        checked_depth(depth, text.layers, vision.layers)
        width = text.width + vision.width

        heads = attention_heads or next(count for count in range(16, 0, -1) if width % count == 0)
        if width % heads:
            raise VLPromptError(
                f"attention_heads={heads} does not divide the joint width {text.width} + {vision.width} = {width}."
            )

        self.cut = [text.width, vision.width]
        self.context = nn.Parameter(random_rows((depth, context_length, width), seed))  # (J, M, Dt + Dv)

        with seeded_modules(seed, "segmentation", "shared attention"):
            self.mixers = Projections(
                [
                    nn.TransformerEncoderLayer(
                        width, heads, feedforward, attention_dropout, batch_first=True, norm_first=norm_first
                    )
                    for _ in range(1 if shared else depth)
                ]
            )

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`."""
        # Each row is one sequence of M tokens; a mixer of its own takes it as a batch of one.
        has_one_mixer = len(self.mixers.networks) == 1
        mixed = self.mixers(self.context if has_one_mixer else self.context[:, None])
        text, vision = mixed.reshape(self.context.shape).split(self.cut, dim=-1)
        return Rows(text=text, vision=vision)
