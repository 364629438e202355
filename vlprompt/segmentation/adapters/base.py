"""The base of segmentation models that adapt: every image starts from the same prompts and leaves nothing behind."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlprompt.core.errors import DataError
from vlprompt.segmentation.base import Frozen, Segmenter, Texts
from vlprompt.segmentation.strategies import STRATEGIES

__all__ = ["AdaptedSegmenter"]


class AdaptedSegmenter(Segmenter):
    """Base of all methods; a method defines :meth:`adapt`. Keyword-only constructor arguments are its options.

    Args:
        segmenter: Where every image starts from; never changed.

    Attributes:
        segmenter: The same.
        prompts: What its strategy learned, by name.

    Raises:
        DataError: If its strategy has no prompts.
    """

    prompts: dict[str, Tensor]

    def __init__(self, segmenter: Segmenter) -> None:
        strategy = segmenter.strategy
        if strategy.tunes != "prompts":
            suitable = [entry.name for entry in STRATEGIES if entry.target.tunes == "prompts"]
            used = segmenter.options.get("strategy", type(strategy).__name__)
            raise DataError(
                f"{used} has no prompts that could be tuned on an image. Build the segmenter with strategy= one of: "
                f"{', '.join(suitable)}."
            )
        super().__init__(segmenter.backbone, strategy)
        self.segmenter = segmenter.eval()
        self.decoder = segmenter.decoder
        self.prompts = {name: parameter.detach() for name, parameter in strategy.named_parameters()}
        self._decoder = _Decoder(segmenter)

    def frozen(self, images: Tensor) -> Frozen:
        """See :meth:`Segmenter.frozen`: the pixels, since views are made of them."""
        return {"image": images.to(self.backbone.device)}

    def decode(self, frozen: Frozen, texts: Texts, size: tuple[int, int]) -> Tensor:
        """See :meth:`Segmenter.decode`; image by image, so that none depends on others."""
        images = frozen["image"]
        if isinstance(texts, str) or len(texts) != len(images):
            raise DataError(
                f"segmentation takes one phrase per image: got {texts!r} for {len(images)} images."
            )
        rows = []
        for row, image in enumerate(images):
            with torch.enable_grad():
                rows.append(self.adapt(image, texts[row : row + 1]).detach())
        return torch.stack(rows)

    @abstractmethod
    def adapt(self, image: Tensor, text: Texts) -> Tensor:
        """Return (1, H, W) logits of a (3, H, W) image and its one phrase."""

    def logits(
        self, prompts: dict[str, Tensor], frozen: Frozen, text: Texts, size: tuple[int, int]
    ) -> Tensor:
        """Return (V, H, W) logits of V views of one image under other prompts than the strategy's own.

        Args:
            prompts: By name, as :attr:`prompts`.
            frozen: What the segmenter's own ``frozen`` made of the views.
            text: One phrase.
            size: (H, W) of the views.
        """
        count = len(next(iter(frozen.values())))
        texts = text.expand(count, -1) if isinstance(text, Tensor) else [text[0]] * count
        renamed = {f"segmenter.strategy.{name}": tensor for name, tensor in prompts.items()}
        # With a graph always: without one segmenters keep features of phrases, and these are of other prompts.
        with torch.enable_grad():
            return functional_call(self._decoder, renamed, (frozen, texts, size))[:, 0]

    def train(self, mode: bool = True) -> AdaptedSegmenter:
        """Stay in evaluation mode: what learns here learns inside one image."""
        nn.Module.train(self, False)
        return self


class _Decoder(nn.Module):
    """Decodes with other tensors in the place of the strategy's parameters."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, frozen: Frozen, texts: Any, size: tuple[int, int]) -> Tensor:
        return self.segmenter.decode(frozen, texts, size)
