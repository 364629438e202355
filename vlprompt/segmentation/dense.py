"""A simple baseline: maps of a ViT, modulated by a phrase, and a decoder of segmentation_models_pytorch.

There is no pretrained decoder, so it learns beside whatever the strategy tunes. The feature pyramid is that of plain
ViT backbones (Li et al., ECCV 2022, arXiv 2203.16527, section 3): maps of one scale, resized to strides 1/2, 1, 2, 4
relative to each other.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.taps import after_block, first_state, grid_of, patch_of, relative_taps, run_taps
from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation import SEGMENTERS
from vlprompt.segmentation.base import Frozen, Segmenter, Texts
from vlprompt.segmentation.strategies.base import Strategy

__all__ = ["Dense"]

_SCALES = (4.0, 2.0, 1.0, 0.5)  # of the pyramid's maps, against the grid of patches


class _Decoder(nn.Module):
    """Four modulated maps through a feature pyramid network."""

    def __init__(self, width: int, dim: int, channels: int, dropout: float) -> None:
        try:
            # An extra of the package, which imports a hundred encoders; only this decoder needs it.
            from segmentation_models_pytorch.base import SegmentationHead
            from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        except ImportError as error:
            raise VLPromptError(
                "dense is built of segmentation_models_pytorch: pip install 'vlprompt[segmentation]'."
            ) from error

        super().__init__()
        self.film = nn.ModuleList(nn.Linear(dim, 2 * channels) for _ in _SCALES)
        self.reduce = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in _SCALES)
        self.pyramid = FPNDecoder([channels] * 4, 4, 2 * channels, channels, dropout)
        self.pyramid.dropout.inplace = False
        self.head = SegmentationHead(channels, 1)

    def forward(self, maps: list[Tensor], condition: Tensor) -> Tensor:
        """Return (B, 1, 4 h, 4 w) logits of four (B, W, h, w) maps with even sides, shallowest first."""
        features = []
        for scale, reduce, film, x in zip(_SCALES, self.reduce, self.film, maps, strict=True):
            gain, shift = film(condition)[:, :, None, None].chunk(2, dim=1)
            x = (1 + gain) * reduce(x) + shift

            if scale != 1:
                x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            features.append(x)

        return self.head(self.pyramid(features))


@SEGMENTERS.register(
    "dense", summary="an smp decoder over a ViT's maps, modulated by the phrase; learns from scratch"
)
class Dense(Segmenter):
    """A feature pyramid network over four taps.

    Args:
        backbone: A ViT backbone.
        strategy: See :class:`Segmenter`; the decoder learns with each of them, so ``zero_shot`` is refused.
        channels: Of the decoder; a multiple of 32, as its group norms need.
        dropout: Before the head, in training.
        seed: Of the decoder's start.
    """

    decoder: _Decoder

    def __init__(
        self,
        backbone: Backbone,
        strategy: Strategy,
        *,
        channels: Annotated[int, Field(ge=32, multiple_of=32)] = 64,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, strategy)
        if strategy.tunes == "nothing":
            raise VLPromptError(
                "dense has no pretrained decoder, so zero_shot says nothing. Use clipseg or cris, or tune."
            )

        tower = self.backbone.vision
        patch_of(tower)
        early, middle, deep = relative_taps(tower.layers)
        self.taps = (early, middle, deep, tower.layers - 1)

        with seeded_modules(seed, "dense decoder"):
            self.decoder = _Decoder(tower.width, self.backbone.dim, channels, dropout)
        self.settle()

    @property
    def decoder_learns(self) -> bool:
        """See :attr:`Segmenter.decoder_learns`; here it always does."""
        return True

    def untouched(self) -> list[nn.Parameter]:
        """See :meth:`Segmenter.untouched`."""
        return [*super().untouched(), *after_block(self.backbone.vision, max(self.taps))]

    def frozen(self, images: Tensor) -> Frozen:
        """See :meth:`Segmenter.frozen`: the tapped states, the first state or the pixels."""
        images = images.to(self.backbone.device)
        if self.strategy.tunes == "all":
            return {"image": images}

        with torch.no_grad():
            first = first_state(self.backbone.vision, images)
            return self._tapped(first, None) if self.static_images else {"hidden": first}

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`."""
        tower = self.backbone.vision
        count = len(next(iter(frozen.values())))
        rows = self.rows(frozen)
        condition, _ = self.condition(texts, rows, count)
        if "tap0" not in frozen:
            first = first_state(tower, frozen["image"]) if "image" in frozen else frozen["hidden"]
            frozen = self._tapped(first, rows.vision)

        # The pyramid halves its maps and doubles them again, so their sides must be even.
        grid = grid_of(tower, size)
        even = [2 * max(1, round(side / 2)) for side in grid]
        maps = []
        for i in range(len(self.taps)):
            patches = frozen[f"tap{i}"][:, 1:].transpose(1, 2).unflatten(2, grid)
            if even != list(grid):
                patches = F.interpolate(patches, even, mode="bilinear", align_corners=False)
            maps.append(patches)

        logits = self.decoder(maps, condition)
        patch = patch_of(tower)
        whole = [side * patch for side in grid]  # pixels
        logits = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]].float()

    def _tapped(self, x: Tensor, prompts: Tensor | None) -> Frozen:
        """Return the states of the tapped blocks, from the tower's first state (B, 1 + T, W)."""
        blocks = sorted(set(self.taps))  # in shallow towers two of them are the same
        taps = run_taps(self.backbone.vision, x, blocks, prompts, pooled=self.strategy.reads_image)
        by_block = dict(zip(blocks, taps.states, strict=True))
        states = {f"tap{i}": by_block[block] for i, block in enumerate(self.taps)}

        if taps.pooled is not None:
            states["pooled"] = taps.pooled
        return states
