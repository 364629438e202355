"""CRIS: words attend to a fused map, and the phrase makes the kernel that paints the mask.

Paper: Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022, arXiv 2111.15174.
Where this differs from the published code: towers stay frozen unless everything is tuned; any image size and shape;
a ViT in place of the ResNet too, with which visual prompts make sense; padding words are never looked at.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.pyramid import (
    dense_pool,
    is_resnet,
    pyramid_stride,
    pyramid_widths,
    resnet_stages,
    vit_maps,
)
from vlprompt.backbones.taps import first_state, padded, patch_of, relative_taps, run_taps
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation import SEGMENTERS
from vlprompt.segmentation._cris import CrisDecoder
from vlprompt.segmentation._last_layer import NewLastLayer
from vlprompt.segmentation._weights import cris_decoder, fill, sizes
from vlprompt.segmentation.base import Frozen, LastLayer, Segmenter, Texts
from vlprompt.segmentation.strategies.base import Strategy

__all__ = ["CRIS"]

_MAPS = ("coarse", "middle", "fine")


@SEGMENTERS.register(
    "cris", summary="words attend to a fused map; the phrase makes the kernel", paper="2111.15174"
)
class CRIS(Segmenter):
    """CRIS on a ModifiedResNet or a ViT.

    Args:
        backbone: Its towers. ``tiny`` and ``cris`` bring a pretrained decoder with them.
        strategy: See :class:`Segmenter`; visual prompts need a ViT.
        weights: The decoder's: None takes what belongs to the backbone (random where nothing does), ``"random"``,
            or the path of a checkpoint in the published layout.
        width: Channels of the fused map; None: the weights' own, else the text tower's width.
        layers: Of the transformer; None: the weights' own, else 3.
        heads: Its attention heads; None: the weights' own, else 8.
        hidden: Width of its MLPs; None: the weights' own, else 2048.
        dropout: In the transformer, while the decoder itself learns.
        last_layer: ``new`` blends the last layer with a learned one; ``tuned`` lets the phrase's kernel and the last
            convolution before it learn too.
        seed: Of random weights.
    """

    decoder: CrisDecoder

    def __init__(
        self,
        backbone: Backbone,
        strategy: Strategy,
        *,
        weights: str | None = None,
        width: Annotated[int, Field(ge=8, multiple_of=4)] | None = None,
        layers: Annotated[int, Field(ge=1)] | None = None,
        heads: Annotated[int, Field(ge=1)] | None = None,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        last_layer: LastLayer = "frozen",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, strategy, words=True)
        self.backbone.text.require_prompts()
        widths, self.stride = pyramid_widths(self.backbone), pyramid_stride(self.backbone)
        self.resnet, self.last_layer = is_resnet(self.backbone), last_layer
        found = cris_decoder(backbone, weights)
        asked = {"width": width, "layers": layers, "heads": heads, "hidden": hidden}
        self.sizes = sizes(found, asked, {"width": self.backbone.text.width})
        deepest = self.backbone.vision.visual.layer4[-1].bn3.num_features if self.resnet else None
        with seeded_modules(seed, "cris decoder"):
            self.decoder = CrisDecoder(
                widths, self.backbone.text.width, deepest, dropout=dropout, **self.sizes
            )
            self.new_layer = NewLastLayer(self.decoder.width, 64) if last_layer == "new" else None
        fill(self.decoder, found, "cris")
        self.settle()

    def tuned_besides(self) -> list[nn.Parameter]:
        """See :meth:`Segmenter.tuned_besides`."""
        if self.new_layer is not None:
            return list(self.new_layer.parameters())
        last = [self.decoder.proj.txt, self.decoder.proj.vis[-1]] if self.last_layer == "tuned" else []
        return [p for module in last for p in module.parameters()]

    def frozen(self, images: Tensor) -> Frozen:
        """Return prepared maps, the maps themselves, the first state or the pixels: the most that never changes."""
        images = padded(images.to(self.backbone.device), self.stride)
        if self.strategy.tunes == "all":
            return {"image": images}
        with torch.no_grad():
            if not self.static_images:
                return {"hidden": first_state(self.backbone.vision, images)}
            found = self._raw(images)
            if self.strategy.tunes == "decoder":
                return found
            maps = self._maps(found, self._grid(images.shape[-2:]))
            out = dict(zip(_MAPS, self.decoder.neck.prepared(maps), strict=True))
            if self.strategy.reads_image:
                out["pooled"] = maps[2].mean((2, 3)) if self.resnet else found["pooled"]
            return out

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`.

        Raises:
            DataError: If features are given in place of phrases: this decoder reads words.
        """
        rows = self.rows(frozen)
        condition, words = self.condition(texts, rows, len(next(iter(frozen.values()))))
        if words is None:
            raise DataError(
                "cris reads every word of a phrase, one feature per phrase is not enough. Use clipseg."
            )
        features = self.decoder.features(self._prepared(frozen, rows.vision, size), condition, words)
        logits = self.decoder.upsample(features, condition)
        whole = [side + -side % self.stride for side in size]
        logits = F.interpolate(logits, whole, mode="bicubic", align_corners=True)
        if self.new_layer is not None:
            logits = self.new_layer(features, logits)
        return logits[..., : size[0], : size[1]].float()

    def _raw(self, images: Tensor) -> Frozen:
        """States of the image tower that the decoder's own weights come after."""
        if self.resnet:
            fine, middle, last = resnet_stages(self.backbone, images)
            return {"second": fine, "third": middle, "fourth": last, "pool": dense_pool(self.backbone, last)}
        return self._tapped(first_state(self.backbone.vision, images), None)

    def _tapped(self, x: Tensor, prompts: Tensor | None) -> Frozen:
        tower = self.backbone.vision
        early, middle, _ = relative_taps(tower.layers)
        blocks = sorted({early, middle, tower.layers - 1})
        taps = run_taps(tower, x, blocks, prompts, pooled=self.strategy.reads_image)
        states = dict(zip(blocks, taps.states, strict=True))
        found = {f"tap{i}": states[b] for i, b in enumerate((early, middle, tower.layers - 1))}
        return found if taps.pooled is None else {**found, "pooled": taps.pooled}

    def _maps(self, raw: Frozen, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        if "second" in raw:
            return raw["second"], raw["third"], self.decoder.joined(raw["pool"], raw["fourth"])
        return vit_maps(self.backbone, [raw[f"tap{i}"] for i in range(3)], grid)

    def _prepared(
        self, frozen: Frozen, prompts: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if "coarse" in frozen:
            return frozen["coarse"], frozen["middle"], frozen["fine"]
        raw = frozen
        if "image" in frozen:
            raw = self._raw(frozen["image"])
        elif "hidden" in frozen:
            raw = self._tapped(frozen["hidden"], prompts)
        return self.decoder.neck.prepared(self._maps(raw, self._grid(size)))

    def _grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Patches of a ViT in rows and columns."""
        unit = self.stride if self.resnet else patch_of(self.backbone.vision)
        height, width = (side + -side % self.stride for side in size)
        return height // unit, width // unit
