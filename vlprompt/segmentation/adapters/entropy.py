"""Prompts of a segmentation model are tuned on one image until it is sure of its surest pixels, seen both ways round.

After TPT (Shu et al., NeurIPS 2022, arXiv 2209.07511), pixel by pixel. For segmentation by a closed list of classes,
Noori et al. (MLMP, NeurIPS 2025, arXiv 2505.21844) minimise entropies of pixels by layer norms, and De Silva et al.
(Seg-TTO, arXiv 2501.04696) by prompts of texts; here one phrase is asked for, so a pixel is inside or outside, and the
prompts are those of any strategy. Nothing of either code is followed.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.core.errors import NonFiniteError
from vlprompt.segmentation.adapters import SEGMENTATION_ADAPTERS
from vlprompt.segmentation.adapters.base import AdaptedSegmenter
from vlprompt.segmentation.base import Segmenter, Texts

__all__ = ["PixelEntropy", "pixel_entropy", "surest"]


@SEGMENTATION_ADAPTERS.register(
    "entropy",
    summary="prompts tuned per image on the entropy of its surest pixels, over the image and its mirror",
    paper="2209.07511",
)
class PixelEntropy(AdaptedSegmenter):
    """Minimise the entropy of the views' mean probability over the surest pixels inside and outside; then answer.

    The entropy of a mean is the mean of the entropies and how much the views disagree, so both go down. Inside and
    outside weigh the same, because outside is most of an image, and all of it would be the surest answer. Where every
    pixel is on one side nothing tells the other, and the image is answered without adaptation.

    Controls: ``steps=0`` (no adaptation), ``share=1`` (the same compute without selection), ``steps=0, answer="mean"``
    (views alone).

    Args:
        segmenter: See :class:`AdaptedSegmenter`.
        steps: Updates per image.
        lr: Learning rate of AdamW, fresh for every image; the first step moves every number by about this much.
        share: Share of the pixels of each side that are used, the surest ones.
        mirror: Whether the image's mirror is a second view; a phrase such as "on the left" then contradicts itself.
        answer: What answers: the image, or the mean probability of all views.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        *,
        steps: Annotated[int, Field(ge=0)] = 4,
        lr: Annotated[float, Field(ge=0)] = 5e-3,
        share: Annotated[float, Field(gt=0, le=1)] = 0.5,
        mirror: bool = True,
        answer: Literal["image", "mean"] = "image",
    ) -> None:
        super().__init__(segmenter)
        self.steps = steps
        self.lr = lr
        self.share = share
        self.mirror = mirror
        self.answer: Literal["image", "mean"] = answer

    def adapt(self, image: Tensor, text: Texts) -> Tensor:
        """See :meth:`AdaptedSegmenter.adapt`."""
        views = torch.stack([image, image.flip(-1)]) if self.mirror else image[None]
        size = (int(image.shape[-2]), int(image.shape[-1]))
        frozen = self.segmenter.frozen(views)
        prompts = {name: start.clone() for name, start in self.prompts.items()}
        optimizer = torch.optim.AdamW(list(prompts.values()), lr=self.lr, weight_decay=0.0)

        def upright(leaves: dict[str, Tensor]) -> Tensor:
            """Return (V, H, W) logits in the frame of the image."""
            logits = self.logits(leaves, frozen, text, size)
            return torch.stack([logits[0], logits[1].flip(-1)]) if self.mirror else logits

        sides: Tensor | None = None
        for _ in range(self.steps):
            leaves = {name: prompt.detach().requires_grad_() for name, prompt in prompts.items()}
            logits = upright(leaves)
            # Chosen once: pixels that are chosen again after every step would only confirm themselves.
            sides = surest(logits.detach(), self.share) if sides is None else sides
            if sides is None:
                break
            entropies = pixel_entropy(logits)
            loss = torch.stack([entropies[side].mean() for side in sides]).mean()
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for (name, prompt), gradient in zip(prompts.items(), gradients, strict=True):
                if gradient is not None and not bool(gradient.isfinite().all()):
                    raise NonFiniteError(
                        f"the gradient of {name} is NaN or infinite; an image can't be adapted to."
                    )
                prompt.grad = gradient
            optimizer.step()

        logits = upright(prompts)
        if self.answer == "image":
            return logits[:1]
        inside, outside = _log_means(logits)
        return (inside - outside)[None]


def pixel_entropy(logits: Tensor) -> Tensor:
    """Return the (H, W) entropies, in nats, of the mean probability of (V, H, W) logits."""
    inside, outside = _log_means(logits)
    return -(inside.exp() * inside + outside.exp() * outside)


def surest(logits: Tensor, share: float) -> Tensor | None:
    """Return (2, H, W) masks of the surest pixels inside and outside; None where all pixels are on one side.

    Args:
        logits: (V, H, W).
        share: Of the pixels of each side, at least one.
    """
    inside, outside = _log_means(logits)
    entropies = pixel_entropy(logits).flatten()
    is_inside = (inside > outside).flatten()
    masks = []
    for side in (is_inside, ~is_inside):
        pixels = side.nonzero()[:, 0]
        if not len(pixels):
            return None
        count = max(1, math.floor(share * len(pixels) + 1e-9))
        kept = pixels[entropies[pixels].argsort(stable=True)[:count]]
        masks.append(torch.zeros_like(side).index_fill(0, kept, True))
    return torch.stack(masks).view(2, *logits.shape[1:])


def _log_means(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (H, W) logarithms of the mean probabilities of inside and of outside."""
    count = math.log(len(logits))
    return F.logsigmoid(logits).logsumexp(0) - count, F.logsigmoid(-logits).logsumexp(0) - count
