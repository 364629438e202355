"""CoCoOp for segmentation: a small network of the image's feature shifts the context of every layer.

Paper: Zhou et al., CVPR 2022, arXiv 2203.05557, section 3.2; for segmentation: TuneVLSeg, ACCV 2024, arXiv 2410.05239.
Where this differs from TuneVLSeg's code: the final norm's gain starts at 0.02, so that the shift does not outweigh the
phrase that the context starts from.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation.strategies import STRATEGIES
from vlprompt.segmentation.strategies._projection import Hidden, projection
from vlprompt.segmentation.strategies.base import Rows
from vlprompt.segmentation.strategies.coop import CoOp

__all__ = ["CoCoOp"]


@STRATEGIES.register("cocoop", summary="context shifted by a small network of the image", paper="2203.05557")
class CoCoOp(CoOp):
    """Learns context and a network per layer, context_i + g_i(image).

    Args:
        backbone: See :class:`CoOp`.
        depth: See :class:`CoOp`.
        context_length: See :class:`CoOp`.
        init: See :class:`CoOp`.
        intermediate_dim: Widths inside the networks; None: one linear layer.
        low_rank: Two linear layers without activation.
        norm: Norm the shift.
        shared: One network for all layers.
        normalise: Read unit-length features of images, as the CoCoOp paper does.
        seed: See :class:`CoOp`.
    """

    reads_image: ClassVar[bool] = True

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
        normalise: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, depth=depth, context_length=context_length, init=init, seed=seed)
        self.normalise = normalise

        with seeded_modules(seed, "segmentation", "meta network"):
            self.networks = torch.nn.ModuleList(
                projection(
                    backbone.dim,
                    backbone.text.width,
                    intermediate_dim,
                    low_rank=low_rank,
                    norm=norm,
                    bias=False,
                )
                for _ in range(1 if shared else depth)
            )

    def forward(self, image: Tensor | None = None) -> Rows:
        """See :meth:`Strategy.forward`; (B, J, M, Dt)."""
        if image is None:
            raise TypeError("this strategy reads the images' features")
        feature = F.normalize(image, dim=-1) if self.normalise else image
        shifts = torch.stack([network(feature) for network in self.networks], dim=1)  # (B, J or 1, Dt)
        return Rows(text=self.context + shifts[:, :, None])
