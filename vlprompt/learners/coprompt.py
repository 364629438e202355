"""CoPrompt: MaPLe with adapters on both embeddings, held near what the frozen model says of other words and views.

Paper: Roy and Etemad, "Consistency-guided Prompt Learning for Vision-Language Models", ICLR 2024, arXiv 2306.01195,
    section 3. The authors' code reads sentences that a language model wrote; here they are the learner's templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Images
from vlprompt.core.descriptions import class_texts
from vlprompt.learners import LEARNERS
from vlprompt.learners._offsets import OffsetOptions
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.clip_adapter import embedding_adapter
from vlprompt.learners.maple import MaPLe
from vlprompt.learners.recipe import Recipe

__all__ = ["CoPrompt"]


@LEARNERS.register(
    "coprompt",
    summary="MaPLe with adapters, consistent with the frozen model on other views",
    paper="2306.01195",
    needs=("text", "vision", "teacher"),
)
class CoPrompt(MaPLe):
    """Deep prompts of :class:`MaPLe`; both embeddings pass an adapter; two losses of consistency.

    An embedding x becomes r A(x) + (1 - r) x, where A is linear, ReLU, linear, ReLU without biases, d -> d / reduction
    -> d. The text's consistency is with the frozen feature of one hand-written sentence, drawn at every step, the same
    for all classes; the image's is with the frozen embedding of another view of the same image.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; one of them is drawn at every step.
        context_length: M, learned tokens per layer; with ``init`` the first M tokens of the phrase.
        depth: J, prompted layers of both towers, at most all the shallower one has.
        init: The phrase before the class name; its tokens after the first M stay as written. Empty: random.
        weight: Of both consistency losses (the paper's lambda).
        distance: ``cosine``: 1 - cosine, the mean of all classes or images; ``mse``: the mean squared difference of
            the unit-length features' numbers.
        image_ratio: r of the images; 0 leaves their embeddings as they are.
        text_ratio: r of the classes.
        reduction: How many times narrower the adapters' hidden layers are than the joint space.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of all random starts.

    Raises:
        BackboneError: If prompts can't enter one of the backbone's towers.
        DataError: If the phrase has fewer than M tokens.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.0035, "batch_size": 4, "epochs": 8}, steps=100, trial_steps=30)

    reads_frozen = True
    pairs_views = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 2,
        depth: Annotated[int, Field(ge=1)] = 12,
        init: str = "a photo of a",
        weight: Annotated[float, Field(ge=0)] = 8.0,
        distance: Literal["cosine", "mse"] = "cosine",
        image_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1,
        text_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2,
        reduction: Annotated[int, Field(ge=1)] = 4,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(
            backbone,
            classnames,
            templates,
            context_length=context_length,
            depth=depth,
            init=init,
            attributes=attributes,
            attribute_length=attribute_length,
            seed=seed,
            **offsets,
        )
        self.weight = weight
        self.distance = distance
        self.image_ratio = image_ratio
        self.text_ratio = text_ratio
        self.image_adapter = embedding_adapter(backbone.dim, reduction, seed, "image adapter")
        self.text_adapter = embedding_adapter(backbone.dim, reduction, seed, "text adapter")
        self._sentences: Tensor | None = None

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        embeddings = super().embed_images(images)
        return self.image_ratio * self.image_adapter(embeddings) + (1 - self.image_ratio) * embeddings

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        embeddings = super().class_embeddings()
        return self.text_ratio * self.text_adapter(embeddings) + (1 - self.text_ratio) * embeddings

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy``, ``consistency_text`` and ``consistency_image`` of a batch of pixels."""
        weights = self.class_weights()
        features = F.normalize(self.batch_embeddings(batch), dim=-1)
        logits = self.backbone.logit_scale * features @ weights.T

        frozen = batch.get("frozen")
        if frozen is None:
            frozen = self.backbone.image_embeddings(batch.get("second", batch["image"]))
        return {
            "cross_entropy": F.cross_entropy(logits, batch["label"]),
            "consistency_text": self.weight * self._difference(weights, self._drawn_sentence()),
            "consistency_image": self.weight * self._difference(features, F.normalize(frozen, dim=-1)),
        }

    def sentence_features(self) -> Tensor:
        """Return (S, C, d) unit-length frozen features of all sentences; computed when training first asks."""
        if self._sentences is None:
            of_class = [class_texts(name, self.templates) for name in self.classnames]
            count = max(len(texts) for texts in of_class)
            # A class with fewer sentences than others begins again with its first.
            texts = [texts[number % len(texts)] for number in range(count) for texts in of_class]
            self._sentences = self.backbone.encode_text(texts).unflatten(0, (count, len(of_class)))
        return self._sentences

    def _drawn_sentence(self) -> Tensor:
        """Return (C, d) features of one sentence of each class: drawn in training, else the first."""
        sentences = self.sentence_features()
        if not self.training:
            return sentences[0]
        drawn = torch.randint(len(sentences), (1,), device=sentences.device)
        return sentences[drawn][0]

    def _difference(self, learned: Tensor, frozen: Tensor) -> Tensor:
        """Return how far unit-length features are from frozen ones."""
        if self.distance == "mse":
            return F.mse_loss(learned, frozen)
        return 1 - (learned * frozen).sum(-1).mean()
