"""ConES for generation: the concept is searched where the text encoder's output stands; the encoder never runs.

Paper: Yi et al., arXiv 2305.18993. Known (abstract): the search takes about ten minutes where textual inversion takes
about an hour. Reconstructed: the two modes, where they start from, and all settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts, normal_start
from vlprompt.core.seeding import torch_rng
from vlprompt.generation import PERSONALISERS
from vlprompt.generation.base import Personaliser
from vlprompt.generation.hosts import Host

__all__ = ["ContextSearch"]


@PERSONALISERS.register("cones", summary="vectors of the context itself, no text encoder", paper="2305.18993")
class ContextSearch(Personaliser):
    """Learns vectors of the denoiser's context.

    ``full``: they are all of the context. ``slot``: they stand at the concept's position in a template's context, whose
    other vectors are fixed. A causal encoder would have read the concept before the vectors behind that position, so
    these are an approximation.

    Args:
        host: The frozen model.
        images: The concept's images; read by ``init="visual"`` only.
        word: What the concept is, coarsely: where the search starts.
        mode: See above.
        template: A sentence with one ``*``.
        length: L, vectors; None: as many as the start has (``full``), or one (``slot``).
        keep_norm: Vectors keep the lengths they start with, which is what the denoiser was trained on; only their
            directions are searched.
        init: ``text``: outputs of the template with the word; ``normal``: noise of their spread; ``visual``: what the
            images show, where contexts are a space of images.
        unfreeze: Patterns of the denoiser's parameters that learn too (second stage).
        seed: Of noise.

    Raises:
        DataError: If the host has no space of images, or the template no ``*``.
    """

    def __init__(
        self,
        host: Host,
        images: Sequence[Image.Image],
        word: str,
        *,
        mode: Literal["full", "slot"] = "full",
        template: str = "a photo of a *.",
        length: Annotated[int, Field(ge=1, le=77)] | None = None,
        keep_norm: bool = False,
        init: Literal["text", "normal", "visual"] = "text",
        unfreeze: tuple[str, ...] = (),
        seed: int = 1,
    ) -> None:
        self.mode = mode
        self.template = template
        self.word = word
        self.around, start = _start(host, word, mode, template, length)
        if init == "normal":
            start = normal_start((1, *start.shape), start, seed)[0]
        elif init == "visual":
            start = host.see(images).expand(len(start), -1)

        if len(start) > 1 and init != "normal":  # vectors that start equal would stay equal
            noise = torch.randn(start.shape, generator=torch_rng(seed, "concept", "apart"))
            start = start + 0.05 * start.norm(dim=-1, keepdim=True) * noise.to(start) / start.shape[-1] ** 0.5

        concepts = ConceptEmbedding(1, len(start), host.width, absolute=True).to(start.device)
        concepts.begin(start[None])
        super().__init__(concepts, host, unfreeze)
        self.norms = start.norm(dim=-1, keepdim=True) if keep_norm else None

    def vectors(self) -> Tensor:
        """Return the (L, d) vectors as the denoiser reads them."""
        vectors = self.concepts()[0]
        if self.norms is None:
            return vectors
        return vectors * (self.norms / vectors.norm(dim=-1, keepdim=True))

    def context(self, template: str | None = None) -> Tensor:
        """See :meth:`Personaliser.context`; mode ``full`` has no template."""
        vectors = self.vectors()
        if self.mode == "full":
            return vectors
        if template is None or template == self.template:
            return _inserted(vectors, *self.around)
        return _inserted(vectors, *self.host.slots(template, self.word, len(vectors)))

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        """See :meth:`ConceptSearch.to_concepts`."""
        facts = {"method": "cones", "mode": self.mode, "template": self.template, "word": self.word}
        return Concepts("generator", self.vectors().detach()[None], tuple(names), self.host.identity, facts)


def _start(
    host: Host, word: str, mode: str, template: str, length: int | None
) -> tuple[tuple[Tensor, int], Tensor]:
    """Return a template's context with the concept's first position, and the (L, d) start of the search."""
    around, first = host.slots(template, word, length or 1)
    if mode == "slot":
        return (around, first), around[first : first + (length or 1)]

    sentence = host.read(template.replace("*", word))
    count = length or len(sentence)
    return (around, first), torch.stack([sentence[i % len(sentence)] for i in range(count)])


def _inserted(vectors: Tensor, around: Tensor, first: int) -> Tensor:
    """Return a context with vectors from the position ``first`` on replaced."""
    return torch.cat([around[:first], vectors, around[first + len(vectors) :]])
