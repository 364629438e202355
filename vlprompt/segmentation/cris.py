"""CRIS: a fused map attends to words, and the phrase makes the convolution kernel that draws the mask.

Paper: Wang et al., "CRIS: CLIP-Driven Referring Image Segmentation", CVPR 2022, arXiv 2111.15174.
Where this differs from the published code: towers stay frozen unless everything is tuned; any image size and shape;
a ViT in place of the ResNet too, with which visual prompts make sense; on a convolutional stem the way to the pixels
reads the stem's finer maps; padding words are never looked at.
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
    stem_pyramid,
    vit_maps,
)
from vlprompt.backbones.taps import (
    fine_widths,
    padded,
    patch_of,
    relative_taps,
    run_taps,
)
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation import SEGMENTERS
from vlprompt.segmentation._cris import CrisDecoder
from vlprompt.segmentation._last_layer import NewLastLayer
from vlprompt.segmentation._stem import require_maps, stem_states
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
        backbone: Its towers. ``tiny``, ``photo-vit`` and ``cris`` bring a pretrained decoder with them.
        strategy: See :class:`Segmenter`; visual prompts need a ViT.
        weights: The decoder's: None takes what belongs to the backbone (random where nothing does), ``"random"``,
            or the path of a checkpoint in the published layout.
        width: Channels of the fused map; None: the weights' own, else the text tower's width.
        layers: Of the transformer; None: the weights' own, else 3.
        heads: Its attention heads; None: the weights' own, else 8.
        hidden: Width of its MLPs; None: the weights' own, else 2048.
        dropout: In the transformer, while the decoder itself learns.
        fine: The maps are those of a convolutional stem below the patches (``photo-vit``), and the decoder reads how
            like the phrase each patch is; None: the weights' own, else where the stem has them.
        pixels: Side of the square that whole images are resized to; None: the weights' own, else the backbone's.
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
        fine: bool | None = None,
        pixels: Annotated[int, Field(ge=32)] | None = None,
        last_layer: LastLayer = "frozen",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, strategy, words=True)
        self.backbone.text.require_prompts()
        self.resnet = is_resnet(self.backbone)
        self.last_layer = last_layer

        stored = cris_decoder(backbone, weights)
        self.words = stored.words
        stem = fine_widths(self.backbone.vision)
        options = {"width": width, "layers": layers, "heads": heads, "hidden": hidden, "fine": fine}
        default = {"width": self.backbone.text.width, "fine": bool(stem) and not stored.source}
        size = sizes(stored, options, default)
        trained_pixels = size.pop("pixels", None)
        self.pixels = pixels or trained_pixels
        self.sizes = dict(size)
        self.fine = bool(size.pop("fine"))
        if self.fine:
            require_maps(stem)

        widths = pyramid_widths(self.backbone, self.fine)
        self.stride = pyramid_stride(self.backbone, self.fine)
        deepest = self.backbone.vision.visual.layer4[-1].bn3.num_features if self.resnet else None

        with seeded_modules(seed, "cris decoder"):
            self.decoder = CrisDecoder(
                widths,
                self.backbone.text.width,
                deepest,
                dropout=dropout,
                fine=stem[:-1] if self.fine else (),
                **size,
            )
            self.new_layer = NewLastLayer(self.decoder.width, 64) if last_layer == "new" else None
        fill(self.decoder, stored, "cris")
        self.settle()

    def tuned_besides(self) -> list[nn.Parameter]:
        """See :meth:`Segmenter.tuned_besides`."""
        if self.new_layer is not None:
            return list(self.new_layer.parameters())
        if self.last_layer == "frozen":
            return []
        projector = self.decoder.proj
        return [*projector.txt.parameters(), *projector.last().parameters()]

    def frozen(self, images: Tensor) -> Frozen:
        """See :meth:`Segmenter.frozen`: prepared maps, the maps themselves, the first state or the pixels.

        Of these it returns the last in the order of computation that the strategy never changes.
        """
        images = padded(images.to(self.backbone.device), self.stride)
        if self.strategy.tunes == "all":
            return {"image": images}

        with torch.no_grad():
            if not self.static_images:
                return stem_states(self.backbone.vision, images, self.fine)

            raw = self._raw(images)
            if self.strategy.tunes == "decoder":
                return raw

            states = self._prepared(raw, images.shape[-2:])
            if self.strategy.reads_image:
                states["pooled"] = self._pooled(raw)
            return states

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`.

        Raises:
            DataError: If features are given instead of phrases: this decoder reads words.
        """
        count = len(next(iter(frozen.values())))
        rows = self.rows(frozen)

        condition, words = self.condition(texts, rows, count)
        if words is None:
            raise DataError(
                "cris reads every word of a phrase, one feature per phrase is not enough. Use clipseg."
            )

        states = self._read(frozen, rows.vision, size)
        maps = (states["coarse"], states["middle"], states["fine"])
        features = self.decoder.features(maps, condition, words, states.get("dense"))
        finer = [states[f"fine{level}"] for level in range(self.decoder.levels)]
        logits = self.decoder.upsample(features, condition, finer)
        padded_size = [side + -side % self.stride for side in size]
        logits = F.interpolate(logits, padded_size, mode="bicubic", align_corners=True)

        if self.new_layer is not None:
            logits = self.new_layer(features, logits)
        return logits[..., : size[0], : size[1]].float()

    def _raw(self, images: Tensor) -> Frozen:
        """Return the states of the image tower that the decoder reads."""
        if self.resnet:
            fine, middle, last = resnet_stages(self.backbone, images)
            return {"second": fine, "third": middle, "fourth": last, "pool": dense_pool(self.backbone, last)}
        return self._tapped(stem_states(self.backbone.vision, images, self.fine), None)

    def _pooled(self, raw: Frozen) -> Tensor:
        """Return (B, d) features of the whole images."""
        if self.resnet:
            return self.decoder.joined(raw["pool"], raw["fourth"]).mean((2, 3))
        return raw["pooled"]

    def _tapped(self, states: Frozen, prompts: Tensor | None) -> Frozen:
        """Return the states of the blocks that are read, and the maps of the stem, from :func:`stem_states`."""
        tower = self.backbone.vision
        last = tower.layers - 1
        early, middle, _ = relative_taps(tower.layers)
        read = (last,) if self.fine else (early, middle, last)
        blocks = sorted(set(read))  # in shallow towers two of them are the same
        taps = run_taps(tower, states["hidden"], blocks, prompts, pooled=self.strategy.reads_image)

        by_block = dict(zip(blocks, taps.states, strict=True))
        raw = {name: state for name, state in states.items() if name.startswith("fine")}
        raw |= {f"tap{i}": by_block[block] for i, block in enumerate(read)}
        if taps.pooled is not None:
            raw["pooled"] = taps.pooled
        return raw

    def _maps(self, raw: Frozen, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return three maps, finest first."""
        if "second" in raw:
            return raw["second"], raw["third"], self.decoder.joined(raw["pool"], raw["fourth"])
        if self.fine:
            levels = self.decoder.levels
            return stem_pyramid(
                self.backbone, [raw[f"fine{i}"] for i in range(levels + 1)], raw["tap0"], grid
            )
        return vit_maps(self.backbone, [raw[f"tap{i}"] for i in range(3)], grid)

    def _read(self, frozen: Frozen, prompts: Tensor | None, size: tuple[int, int]) -> Frozen:
        """Return what the decoder reads, from whatever :meth:`frozen` returned."""
        if "coarse" in frozen:
            return frozen

        raw = frozen
        if "image" in frozen:
            raw = self._raw(frozen["image"])
        elif "hidden" in frozen:
            raw = self._tapped(frozen, prompts)
        return self._prepared(raw, size)

    def _prepared(self, raw: Frozen, size: tuple[int, ...]) -> Frozen:
        """Return the maps after the part of the neck that no phrase enters, and what is read of a stem besides."""
        maps = self._maps(raw, self._grid(size))
        states = dict(zip(_MAPS, self.decoder.neck.prepared(maps), strict=True))
        if self.fine:
            states |= {f"fine{level}": raw[f"fine{level}"] for level in range(self.decoder.levels)}
            states["dense"] = F.normalize(maps[2].flatten(2).transpose(1, 2), dim=-1)
        return states

    def _grid(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Return the rows and columns of the coarsest map, or of a ViT's patches."""
        unit = self.stride if self.resnet else patch_of(self.backbone.vision)
        height, width = (side + -side % self.stride for side in size)
        return height // unit, width // unit
