"""Frozen text-to-image models behind one interface: their loss, their text encoder, and drawing from a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlprompt.backbones.layout import slot
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import derive_seed
from vlprompt.diffusion.denoiser import to_patches
from vlprompt.diffusion.tiny import TinyDiffusion

__all__ = ["MARK", "Host", "TinyHost", "split_template"]

MARK = "*"
"""Stands for the concept in a template."""


class Host:
    """A frozen model.

    Attributes:
        identity: Facts that its concepts depend on; JSON-able.
        network: The denoiser.
        width: d, of a context's vectors.
        levels: Number of noise levels.
    """

    identity: dict[str, Any]
    network: nn.Module
    width: int
    levels: int = 1000

    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """Return what the denoiser works on, (n, c, h, w)."""
        raise NotImplementedError

    def loss(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return the mean squared error of what the network is trained to predict.

        Args:
            latents: (B, c, h, w).
            noise: (B, c, h, w) standard normal.
            time: (B,) noise levels.
            context: (B, S, d).
        """
        raise NotImplementedError

    def read(self, text: str) -> Tensor:
        """Return the text encoder's output of a sentence without padding, (S, d)."""
        raise NotImplementedError

    def slots(self, template: str, word: str, length: int) -> tuple[Tensor, int]:
        """Return a template's context (S, d) with ``length`` positions for the concept, and the first of them.

        At these positions stand the outputs of ``word``, from which a search may start.
        """
        raise NotImplementedError

    def word(self, text: str, length: int) -> Tensor:
        """Return (length, Dt) input embeddings of a word's tokens, repeated if there are fewer."""
        raise NotImplementedError

    def read_with(self, template: str, vectors: Tensor) -> Tensor:
        """Return the text encoder's (S, d) output of a template with (L, Dt) input embeddings in it, with a graph."""
        raise NotImplementedError

    def see(self, images: Sequence[Image.Image]) -> Tensor:
        """Return a (d,) context vector of what images show.

        Raises:
            DataError: If the model's context is no space of images.
        """
        raise DataError(f"init='visual': contexts of {type(self).__name__} are no space of images. Use text.")

    def draw(self, context: Tensor, count: int, seed: int) -> list[Image.Image]:
        """Return ``count`` images of one (S, d) context."""
        raise NotImplementedError


class TinyHost(Host):
    """``tiny-diffusion``, whose contexts are sequences of vectors of `tiny`'s joint space.

    A sentence is one vector here, so a template's context is the vector of the sentence without the concept, followed
    by those of the concept.

    Args:
        generator: See :class:`vlprompt.diffusion.tiny.TinyDiffusion`.
    """

    def __init__(self, generator: TinyDiffusion) -> None:
        self.generator = generator
        self.backbone = generator.backbone
        self.network = generator.denoiser
        self.width = generator.denoiser.dim
        self.identity = {key: generator.identity[key] for key in ("kind", "weights", "condition")}

    def latents(self, images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`Host.latents`."""
        return to_patches(_pixels(images, 64)).to(self.backbone.device)

    def loss(self, latents: Tensor, noise: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """See :meth:`Host.loss`; the network predicts the image, weighted by signal to noise as in its training."""
        denoiser = self.generator.denoiser
        predicted = denoiser(denoiser.noised(latents, noise, time), time, context)
        level = denoiser.alphas[time]
        weight = (level / (1 - level)).clamp(1.0, 5.0)
        return (weight * (predicted - latents).square().mean((1, 2, 3))).mean()

    def read(self, text: str) -> Tensor:
        """See :meth:`Host.read`."""
        return self.backbone.encode_text([text])

    def slots(self, template: str, word: str, length: int) -> tuple[Tensor, int]:
        """See :meth:`Host.slots`."""
        before, after = split_template(template)
        around = self.read(" ".join(f"{before} {after}".split()))
        named = self.read(f"{before}{word}{after}").repeat(length, 1)
        return torch.cat([around, named]), 1

    def word(self, text: str, length: int) -> Tensor:
        """See :meth:`Host.word`."""
        ids = self.backbone.text.require_tokenizer().encode(text)
        return self.backbone.text.embed_tokens([ids[i % len(ids)] for i in range(length)]).float()

    def read_with(self, template: str, vectors: Tensor) -> Tensor:
        """See :meth:`Host.read_with`."""
        before, after = split_template(template)
        tower = self.backbone.text
        slots = [slot(i) for i in range(len(vectors))]
        pieces: list[str | int] = [before.strip(), *slots, after.strip()]
        sentence = tower.sentence(*(piece for piece in pieces if piece != ""))
        return nn.functional.normalize(tower.encode(tower.layout([sentence]), vectors), dim=-1)

    def see(self, images: Sequence[Image.Image]) -> Tensor:
        """See :meth:`Host.see`."""
        pixels = torch.stack([self.backbone.preprocess(image) for image in images])
        return nn.functional.normalize(self.backbone.encode_image(pixels).mean(0), dim=-1)

    def draw(self, context: Tensor, count: int, seed: int) -> list[Image.Image]:
        """See :meth:`Host.draw`."""
        seeds = [derive_seed(seed, "personalised", k) for k in range(count)]
        return self.generator.from_condition(context.detach().expand(count, -1, -1), seeds)


def split_template(template: str) -> tuple[str, str]:
    """Return what stands before and after the concept.

    Raises:
        DataError: If it does not stand exactly once in the template.
    """
    if template.count(MARK) != 1:
        raise DataError(f"a template has one {MARK!r} where the concept stands; got {template!r}.")
    before, after = template.split(MARK)
    return before, after


def _pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Return (n, 3, size, size) in [0, 1], squashed if they are not square."""
    from torchvision.transforms.v2 import functional as tvf

    square = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return torch.stack([tvf.to_dtype(tvf.to_image(image), torch.float32, scale=True) for image in square])
