"""Textual inversion: the concept is a new word, learned through the text encoder. What ConES is compared with.

Paper: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion", ICLR
2023, arXiv 2208.01618. Differs from the published recipe in that one template is used instead of a list of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from vlprompt.concepts.embedding import Concepts
from vlprompt.generation import PERSONALISERS
from vlprompt.generation.base import Personaliser
from vlprompt.generation.hosts import Host

__all__ = ["InvertedWord"]


@PERSONALISERS.register(
    "textual-inversion", summary="a new word's input embedding, through the text encoder", paper="2208.01618"
)
class InvertedWord(Personaliser):
    """Learns input embeddings of the text encoder; every step runs and differentiates it.

    Args:
        host: The frozen model.
        images: The concept's images; not read.
        word: A word whose embeddings the search starts from.
        template: A sentence with one ``*``.
        length: Learned embeddings.
        unfreeze: Patterns of the denoiser's parameters that learn too.
    """

    def __init__(
        self,
        host: Host,
        images: Sequence[Image.Image],
        word: str,
        *,
        template: str = "a photo of a *.",
        length: Annotated[int, Field(ge=1, le=64)] = 1,
        unfreeze: tuple[str, ...] = (),
    ) -> None:
        self.template = template
        self.word = word
        words = nn.ParameterDict({"words": nn.Parameter(host.word(word, length).clone())})
        super().__init__(words, host, unfreeze)

    def context(self, template: str | None = None) -> Tensor:
        """See :meth:`Personaliser.context`."""
        assert isinstance(self.concepts, nn.ParameterDict)
        return self.host.read_with(template or self.template, self.concepts["words"])

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        """See :meth:`ConceptSearch.to_concepts`: the context that the word makes of its template."""
        with torch.no_grad():
            vectors = self.context()[None]
        facts = {"method": "textual-inversion", "mode": "full", "template": self.template, "word": self.word}
        return Concepts("generator", vectors, tuple(names), self.host.identity, facts)
