"""CLIPSeg: a phrase modulates token states of three depths of CLIP's image tower, and a small decoder paints a mask.

Paper: Lüddecke and Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022, arXiv 2112.10003.
Where this differs from the published code: any image size and shape; visual prompts leave the sequence before the
decoder unless ``keep_prompts``; the refined upsampling works for any patch size.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.taps import (
    after_block,
    dense_embeddings,
    fine_widths,
    grid_of,
    patch_of,
    relative_taps,
    run_taps,
)
from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import seeded_modules
from vlprompt.segmentation import SEGMENTERS
from vlprompt.segmentation._film import FilmDecoder
from vlprompt.segmentation._last_layer import NewLastLayer
from vlprompt.segmentation._stem import require_maps, stem_states
from vlprompt.segmentation._weights import Decoder, clipseg_decoder, fill, sizes
from vlprompt.segmentation.base import Frozen, LastLayer, Segmenter, Texts
from vlprompt.segmentation.strategies.base import Strategy

__all__ = ["CLIPSeg"]


@SEGMENTERS.register(
    "clipseg", summary="FiLM-conditioned decoder over three taps of a ViT", paper="2112.10003"
)
class CLIPSeg(Segmenter):
    """CLIPSeg on any ViT of the library.

    Args:
        backbone: A ViT backbone. ``tiny``, ``photo-vit`` and ``clipseg`` bring a pretrained decoder with them.
        strategy: See :class:`Segmenter`.
        weights: The decoder's: None takes what belongs to the backbone (random where nothing does), ``"random"``,
            or a folder or Hugging Face name in transformers' layout.
        taps: Ascending blocks whose states are read, counted from 0; None: the weights' own, else relative depths.
        reduce: Width of the decoder; None: the weights' own, else 64.
        hidden: Width of its MLPs; None: the weights' own, else 2048.
        refined: Upsampling in two steps; None: the weights' own, else in one.
        fine: The decoder also reads the maps of a convolutional stem below the patches (``photo-vit``), and how like
            the phrase each patch is; None: the weights' own, else where the stem has them.
        pixels: Side of the square that whole images are resized to; None: the weights' own, else the backbone's.
        last_layer: ``new`` blends the last layer with a learned one, ``tuned`` lets the pretrained one learn too.
        keep_prompts: Visual prompts go through the decoder, as in TuneVLSeg's code.
        seed: Of random weights.
    """

    decoder: FilmDecoder

    def __init__(
        self,
        backbone: Backbone,
        strategy: Strategy,
        *,
        weights: str | None = None,
        taps: tuple[int, ...] | None = None,
        reduce: Annotated[int, Field(ge=4)] | None = None,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        refined: bool | None = None,
        fine: bool | None = None,
        pixels: Annotated[int, Field(ge=32)] | None = None,
        last_layer: LastLayer = "frozen",
        keep_prompts: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, strategy)
        tower = self.backbone.vision
        self.patch = patch_of(tower)
        self.keep_prompts = keep_prompts
        self.last_layer = last_layer

        stored = clipseg_decoder(backbone, weights)
        self.words = stored.words
        options = {"reduce": reduce, "hidden": hidden, "refined": refined, "fine": fine}
        widths = fine_widths(tower)
        default = {"taps": relative_taps(tower.layers), "fine": bool(widths) and not stored.source}
        size = sizes(stored, options, default)
        trained_pixels = size.pop("pixels", None)
        self.pixels = pixels or trained_pixels
        if taps is not None:
            # Other blocks than the weights' own make sense: CLIPSeg was trained with (3, 7, 9), and is used with
            # (3, 6, 9).
            size["taps"] = _as_many(taps, stored)
        self.sizes = dict(size)
        self.taps = _checked_taps(tuple(size.pop("taps")), tower.layers)
        self.fine = bool(size.pop("fine"))
        self._coarsest = f"fine{len(widths) - 1}"
        if self.fine:
            require_maps(widths)
            _check_last(self.taps, tower.layers)

        with seeded_modules(seed, "clipseg decoder"):
            self.decoder = FilmDecoder(
                tower.width,
                self.backbone.dim,
                self.patch,
                taps=len(self.taps),
                fine=widths if self.fine else (),
                **size,
            )
            self.new_layer = NewLastLayer(self.decoder.width) if last_layer == "new" else None
        fill(self.decoder, stored, "clipseg")
        self.settle()

    def tuned_besides(self) -> list[nn.Parameter]:
        """See :meth:`Segmenter.tuned_besides`."""
        if self.last_layer == "frozen":
            return []
        layer = self.new_layer if self.new_layer is not None else self.decoder.last()
        return list(layer.parameters())

    def untouched(self) -> list[nn.Parameter]:
        """See :meth:`Segmenter.untouched`."""
        if self.fine:
            return super().untouched()  # what pools the last block's tokens is read for each of them
        return [*super().untouched(), *after_block(self.backbone.vision, max(self.taps))]

    def frozen(self, images: Tensor) -> Frozen:
        """See :meth:`Segmenter.frozen`: reduced tokens, tapped states, the first state or the pixels.

        Of these it returns the last in the order of computation that the strategy never changes.
        """
        images = images.to(self.backbone.device)
        if self.strategy.tunes == "all":
            return {"image": images}

        with torch.no_grad():
            states = stem_states(self.backbone.vision, images, self.fine)
            if not self.static_images:
                return states

            first = states.pop("hidden")
            taps = run_taps(self.backbone.vision, first, self.taps, pooled=self.strategy.reads_image)
            if self.strategy.tunes == "decoder":
                states |= {f"tap{i}": state for i, state in enumerate(taps.states)}
            else:
                reduced = self.decoder.reduced(taps.states)
                states |= {f"reduced{i}": state for i, state in enumerate(reduced)}
                if self.fine:
                    states["dense"] = self._dense(taps.states[-1], states[self._coarsest])
            if taps.pooled is not None:
                states["pooled"] = taps.pooled
            return states

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`."""
        count = len(next(iter(frozen.values())))
        rows = self.rows(frozen)
        condition, _ = self.condition(texts, rows, count)

        frozen = self._tapped(frozen, rows.vision)
        reduced = tuple(frozen[f"reduced{i}"] for i in range(len(self.taps)))
        grid = grid_of(self.backbone.vision, size)
        features = self.decoder.features(reduced, condition, grid, frozen.get("dense"))
        fine = [frozen[name] for name in sorted(frozen) if name.startswith("fine")]
        logits = self.decoder.paint(features, condition, fine)
        if self.new_layer is not None:
            logits = self.new_layer(features, logits)

        # A grid of whole patches may be larger than the image.
        return logits[..., : size[0], : size[1]].float()

    def _tapped(self, frozen: Frozen, prompts: Tensor | None) -> Frozen:
        """Return what the decoder reads, from whatever :meth:`frozen` returned."""
        if "reduced0" in frozen:
            return frozen

        count = len(self.taps)
        states = dict(frozen)
        if "image" in frozen:
            states = stem_states(self.backbone.vision, frozen["image"], self.fine)
        if "tap0" in states:
            taps = tuple(states[f"tap{i}"] for i in range(count))
        else:
            taps = run_taps(
                self.backbone.vision, states["hidden"], self.taps, prompts, keep_prompts=self.keep_prompts
            ).states

        if self.fine:
            states["dense"] = self._dense(taps[-1], states[self._coarsest])
        return states | {f"reduced{i}": state for i, state in enumerate(self.decoder.reduced(taps))}

    def _dense(self, state: Tensor, coarsest: Tensor) -> Tensor:
        """Return the patches' features in the joint space.

        Args:
            state: (B, 1 + T, W) tokens of the last block.
            coarsest: (B, C, 2 h, 2 w) map of the stem before the patches.
        """
        patches = (coarsest.shape[-2] // 2) * (coarsest.shape[-1] // 2)
        return dense_embeddings(self.backbone.vision, state, patches)


def _as_many(taps: tuple[int, ...], decoder: Decoder) -> tuple[int, ...]:
    """Return the blocks, if there are as many as the decoder's weights read.

    Raises:
        VLPromptError: If there are more or fewer.
    """
    trained = decoder.sizes.get("taps", taps) if decoder.source else taps
    if len(taps) != len(trained):
        raise VLPromptError(f"taps={taps}: the decoder of {decoder.source} reads {len(trained)} blocks.")
    return taps


def _checked_taps(taps: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return the blocks, if they are in ascending order and the tower has them.

    Raises:
        VLPromptError: If not.
    """
    is_ascending = list(taps) == sorted(set(taps))
    if not taps or not is_ascending or not 0 <= taps[0] <= taps[-1] < layers:
        raise VLPromptError(f"taps={taps}: expected ascending numbers of blocks, 0 to {layers - 1}.")
    return taps


def _check_last(taps: tuple[int, ...], layers: int) -> None:
    """Raise VLPromptError if the last tapped block, whose patches are compared with the phrase, is not the last one."""
    if taps[-1] != layers - 1:
        raise VLPromptError(
            f"taps={taps}: with fine=true the last one must be the last block ({layers - 1}), whose patches are "
            "compared with the phrase."
        )
