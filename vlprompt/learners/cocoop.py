"""CoCoOp: words around the class name that a small network shifts for every image.

Paper: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022, arXiv 2203.05557,
    section 3.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["CoCoOp"]

# Bounds of one pass without gradient: what is stored per image (keys and values of its context) and per sentence.
_IMAGES = 64
_SENTENCES = 1 << 15
_FULL_SENTENCES = 1 << 9  # where the tower can't share an image's context among classes


@LEARNERS.register(
    "cocoop",
    summary="learned context shifted by a small network per image",
    paper="2203.05557",
    needs=("text",),
)
class CoCoOp(OffsetSentences):
    """Sentences [start | M context vectors + h(f) | class name . end], where f is the unit-length image embedding.

    h is linear, ReLU, linear: d -> d / reduction -> Dt; it shifts all context vectors of an image alike. Only
    the embedding of the image enters, so the image tower runs once per image. In a causal text tower an
    image's [start | context] is run once and not once per class.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: M, number of context vectors (the paper's n_ctx); ignored with ``init``.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2).
        reduction: How many times narrower the network's hidden layer is than the joint space.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 1, "epochs": 10})

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        reduction: Annotated[int, Field(ge=1)] = 16,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        start = initial_context(backbone.text, context_length, init, seed)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(words.joined(start, seed))  # (M, Dt), then those of the attributes
        self.shifted = len(start)

        hidden = max(1, backbone.dim // reduction)
        with seeded_modules(seed, "meta net"):
            self.meta_net = nn.Sequential(
                OrderedDict(
                    linear1=nn.Linear(backbone.dim, hidden),
                    relu=nn.ReLU(),
                    linear2=nn.Linear(hidden, backbone.text.width),
                )
            )

        self.layout = context_layout(backbone.text, self.classnames, len(start), attributes=words)
        self._begin_offsets(offsets, seed)

    def class_weights(self) -> Tensor:
        """Refuse: there is one set of weights per image, see :meth:`weights_for`."""
        raise VLPromptError(
            "cocoop has no class weights of its own: they depend on the image. Use weights_for(embeddings)."
        )

    def weights_for(self, embeddings: Tensor) -> Tensor:
        """Return (B, C, d) unit-length class weights, one set for each of (B, d) image embeddings."""
        shift = self.meta_net(F.normalize(embeddings, dim=-1))  # (B, Dt)
        context = self.context[: self.shifted] + shift[:, None]  # (B, M, Dt)
        if len(self.context) > self.shifted:  # the attributes' own vectors are the same for all images
            still = self.context[self.shifted :].expand(len(embeddings), -1, -1)
            context = torch.cat([context, still], dim=1)
        return F.normalize(self._encode(context), dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings; without gradient a few images at a time."""
        # The text tower bounds what its graph keeps, and a traced graph has any number of images.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._logits(embeddings)

        sentences = _SENTENCES if self.backbone.text.packable else _FULL_SENTENCES
        images = max(1, min(_IMAGES, sentences // len(self.classnames)))
        return torch.cat([self._logits(part) for part in embeddings.split(images)])

    def _logits(self, embeddings: Tensor) -> Tensor:
        weights = self.weights_for(embeddings)
        return self.backbone.logit_scale * (weights @ F.normalize(embeddings, dim=-1)[..., None])[..., 0]
