"""LASP: learned context whose classes must also be told apart by what hand-written sentences say of them.

Paper: Bulat and Tzimiropoulos, "LASP: Text-to-Text Optimization for Language-Aware Soft Prompting of Vision & Language
    Models", CVPR 2023, arXiv 2210.01115, section 3, with one group of prompts. The authors' code also trains the image
    tower's norms; here that is an option, without which image embeddings may be cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Images
from vlprompt.core.names import clean_classname
from vlprompt.core.trainable import OwnRate
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe
from vlprompt.learners.two_stage import TowerNorms

__all__ = ["LASP", "LASP_TEXTS"]

# The sentences of the authors' configuration, in their order; one of them stands there twice.
LASP_TEXTS = (
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "{} texture.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of a {}.",
    "a photo of many {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a pixelated photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a close-up photo of the {}.",
    "a low resolution photo of a {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
)


class _SlowNorms(TowerNorms, OwnRate):
    """Norms of the image tower, which learn at a tenth of the rate."""

    rate = 0.1


@LEARNERS.register(
    "lasp",
    summary="learned context that classifies hand-written sentences too",
    paper="2210.01115",
    needs=("text", "teacher"),
)
class LASP(OffsetSentences):
    """Sentences [start | M context vectors | class name . end] and one learned offset, trained on images and on texts.

    The embedding of class c is t_c + b, with b (d,) learned (the paper's correction of what prompts do to the alignment
    of the towers). Beside the images, each hand-written sentence's frozen feature of every class is classified by the
    learned class weights w: the mean over sentences g and classes c of -log softmax(tau <w_c^g, w>)_c.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; used with ``texts="templates"``.
        context_length: M, number of context vectors; ignored with ``init``.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2).
        weight: Of the text-to-text loss; 0 leaves it out.
        texts: Hand-written sentences that are classified: the 35 of the authors' configuration, or the learner's own
            templates.
        noise: Standard deviation of what is added to each number of the sentences' unit-length features.
        noise_probability: Share of the training steps that add noise.
        extra_names: Names of classes without images (the paper's virtual classes) that the texts are classified among
            too. The authors' code takes those of the whole data set, also the half that a base-to-new run must not
            know: here they are named, or not used.
        image_norms: Learn the image tower's norms too, those before attention and before the MLP of every block, at a
            tenth of the rate, as in the authors' code. What is learned is a shift of each, and weight decay pulls the
            shift to zero, where the authors' pulls the scale.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower, or norms are to learn in an image tower
            whose blocks can't be edited.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.032, "batch_size": 32, "epochs": 25, "warmup_epochs": 3, "grad_clip": 1.0})
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        weight: Annotated[float, Field(ge=0)] = 5.0,
        texts: Literal["authors", "templates"] = "authors",
        noise: Annotated[float, Field(ge=0)] = 0.05,
        noise_probability: Annotated[float, Field(ge=0, le=1)] = 0.5,
        extra_names: Sequence[str] = (),
        image_norms: bool = False,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.weight = weight
        self.noise = noise
        self.noise_probability = noise_probability
        self.texts = LASP_TEXTS if texts == "authors" else self.templates

        start = initial_context(backbone.text, context_length, init, seed)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(words.joined(start, seed))  # (M, Dt), then those of the attributes
        self.offset = nn.Parameter(torch.zeros(backbone.dim))

        extra = dict.fromkeys(map(clean_classname, extra_names))
        self.all_names = (*self.classnames, *(name for name in extra if name not in self.classnames))
        self.layout = context_layout(backbone.text, self.classnames, len(start), attributes=words)
        self._begin_offsets(offsets, seed)
        self.all_layout = self.layout
        if len(self.all_names) > len(self.classnames):
            self.all_layout = context_layout(backbone.text, self.all_names, len(start), attributes=words)
            if self.offsets is not None:
                self.all_layout = self.offsets.arrange(self.all_layout, self.all_names)

        self.norms: TowerNorms | None = None
        if image_norms:
            backbone.vision.require_edits()
            self.norms = _SlowNorms(backbone.vision.block_norms(), ())
            self.static_images = False

        self._text_features: Tensor | None = None

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem, below the first norm that learns."""
        return 1

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        edits = None if self.norms is None else self.norms.edits()
        return self.backbone.image_embeddings(images, adapters=edits)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context) + self.offset

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy`` and ``text_to_text``, the weighted loss of the hand-written sentences."""
        embeddings = self.batch_embeddings(batch)
        named = self._encode(self.context, layout=self.all_layout) + self.offset
        weights = F.normalize(self.refined(named), dim=-1)  # one text pass serves both losses

        features = F.normalize(embeddings, dim=-1)
        logits = self.backbone.logit_scale * features @ weights[: len(self.classnames)].T
        losses = {"cross_entropy": F.cross_entropy(logits, batch["label"])}
        if self.weight:
            losses["text_to_text"] = self.weight * self._text_loss(weights)
        return losses

    def text_features(self) -> Tensor:
        """Return (G, N, d) unit-length frozen features of sentences and names; computed when training first asks."""
        if self._text_features is None:
            sentences = [text.format(name) for text in self.texts for name in self.all_names]
            features = self.backbone.encode_text(sentences)
            self._text_features = features.unflatten(0, (len(self.texts), len(self.all_names)))
        return self._text_features

    def _text_loss(self, weights: Tensor) -> Tensor:
        """Return the mean cross entropy of every sentence's feature among all (N, d) class weights."""
        targets = self.text_features()
        if self.training and self.noise:
            # Drawn as a tensor: a traced graph has no branch for it.
            noisy = torch.rand((), device=targets.device) < self.noise_probability
            targets = targets + noisy * self.noise * torch.randn_like(targets)

        logits = self.backbone.logit_scale * targets @ weights.T  # (G, N, N)
        labels = torch.arange(len(weights), device=logits.device).repeat(len(targets))
        return F.cross_entropy(logits.flatten(0, 1), labels)
