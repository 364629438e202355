"""MMRL: tokens of a space that both towers share enter their upper layers; new classes are named without them.

Paper: Guo and Gu, "MMRL: Multi-Modal Representation Learning for Vision-Language Models", CVPR 2025, arXiv 2503.08497,
section 3.

Unlike the authors' code: the logit scale is the backbone's, not 100; the frozen features of its two regularisers come
from the same towers without the tokens, so no second copy of the model is held; nothing is kept from one evaluation to
the next. Towers that pool the mean of their patches keep doing so, without the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit
from vlprompt.backbones.vision import Images
from vlprompt.core.seeding import seeded_modules, torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._visual import upper_blocks
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["MMRL"]

_SHARE = 7 / 12  # of the blocks: 6 to 12 of 12, counted from 1


@LEARNERS.register(
    "mmrl",
    summary="tokens of a shared space in the upper layers of both towers",
    paper="2503.08497",
    needs=("text", "vision", "teacher"),
)
class MMRL(Learner):
    """K tokens of a learned space, projected into each of the last J layers of both towers, behind the first token.

    An image has two features: the tower's own f, and r, which a learned projection makes of the mean token. Classes
    that were trained on are scored by alpha tau <f, w> + (1 - alpha) tau <r, w>, where all are; others by tau <f, w>.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: The first makes the sentences.
        tokens: K.
        space: Width of the shared space; the published code has 2048 for EuroSAT.
        depth: J, layers of each tower, at most all the shallower one has; None: 7 of 12.
        alpha: Weight of f in the loss and in the score of known classes.
        regularisation: Weight of 1 - cos between features with the tokens and without, of images and of classes. The
            published code has a constant for every data set, chosen on no validation data: Stanford Cars 7; FGVC
            Aircraft, SUN397, DTD 6; Food101 5; Oxford Flowers 4; UCF101 3; ImageNet, Caltech101 0.5; Oxford Pets 0.2;
            EuroSAT 0.01; 1 elsewhere.
        head_classes: The classes that are known; None: all. A learner that was brought to other classes has it.
        seed: Of all random starts.

    Raises:
        BackboneError: If tokens can't enter between the blocks of a tower.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe(
        {"lr": 0.001, "batch_size": 4, "epochs": 10, "optimizer": "adamw"},
        factors=(0.1, 1.0, 10.0),
        steps=100,
        trial_steps=30,
    )

    static_images = False
    reads_frozen = True
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        tokens: Annotated[int, Field(ge=1, le=64)] = 5,
        space: Annotated[int, Field(ge=1)] = 512,
        depth: Annotated[int | None, Field(ge=1)] = None,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.7,
        regularisation: Annotated[float, Field(ge=0)] = 1.0,
        head_classes: tuple[str, ...] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.keep_head(head_classes)
        self.knows_all = None not in self.head_places
        self.alpha = alpha
        self.regularisation = regularisation

        text = backbone.text
        vision = backbone.vision
        text.require_entering_tokens()
        vision.require_entering_tokens()
        count = upper_blocks(depth, _SHARE, text.layers, vision.layers)

        start = 0.02 * torch.randn(tokens, space, generator=torch_rng(seed, "mmrl tokens"))
        self.tokens = nn.Parameter(start)  # R: (K, width of the shared space)
        self.to_text = _projections(count, space, text.width, seed, "text")
        self.to_vision = _projections(count, space, vision.width, seed, "vision")
        start = torch.randn(vision.width, backbone.dim, generator=torch_rng(seed, "mmrl head"))
        self.head = nn.Parameter(start * vision.width**-0.5)  # P_r: (Dv, d)

        sentences = [text.sentence(self.templates[0].format(name)) for name in self.classnames]
        self.layout = text.layout(sentences, self.classnames)
        self._frozen_weights: Tensor | None = None

    # --- the classifier

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        tower = self.backbone.text
        return tower.encode(self.layout, adapters=self._edits(self.to_text, tower.layers))

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem, and the blocks below the first tokens."""
        return 1 + self.backbone.vision.layers - len(self.to_vision)

    def embed_images(self, images: Images) -> Tensor:
        """Return (B, 2 d) embeddings of images: f, then r, neither normalised."""
        edits = self._edits(self.to_vision, self.backbone.vision.layers)
        features, tokens = self.backbone.image_embeddings_and_tokens(images, edits)
        return torch.cat([features, tokens.mean(1) @ self.head], dim=-1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 2 d) embeddings; see the class."""
        own, of_tokens = self._both(embeddings, self._weights())
        return self.alpha * own + (1 - self.alpha) * of_tokens if self.knows_all else own

    # --- training

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross entropies of both features, weighted, and distances to the frozen towers (equation 9)."""
        embeddings = self.batch_embeddings(batch)
        weights = self.class_weights()
        own, of_tokens = self._both(embeddings, weights)

        frozen = batch.get("frozen")
        if frozen is None:
            frozen = self.backbone.image_embeddings(batch["image"])
        features = embeddings[:, : self.backbone.dim]

        return {
            "cross_entropy": self.alpha * F.cross_entropy(own, batch["label"]),
            "token_cross_entropy": (1 - self.alpha) * F.cross_entropy(of_tokens, batch["label"]),
            "image_distance": self.regularisation * _distance(features, frozen),
            "text_distance": self.regularisation * _distance(weights, self.frozen_weights()),
        }

    def frozen_weights(self) -> Tensor:
        """Return (C, d) features of the sentences without tokens; computed when training first asks."""
        if self._frozen_weights is None:
            with torch.no_grad():
                self._frozen_weights = self.backbone.text.encode(self.layout)
        return self._frozen_weights

    # --- parts

    def _both(self, embeddings: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return tau <f, w> and tau <r, w>, each (B, C)."""
        halves = embeddings.split(self.backbone.dim, dim=-1)
        own, of_tokens = (
            self.backbone.logit_scale * F.normalize(half, dim=-1) @ weights.T for half in halves
        )
        return own, of_tokens

    def _edits(self, projections: nn.ModuleList, layers: int) -> list[BlockEdit | None]:
        """Return one entry per block of a tower: the tokens that enter before it."""
        below: list[BlockEdit | None] = [None] * (layers - len(projections))
        return [*below, *(BlockEdit(tokens=project(self.tokens)) for project in projections)]


def _projections(count: int, inputs: int, outputs: int, seed: int, tower: str) -> nn.ModuleList:
    """Return one linear layer per block, all from one draw, as in the authors' code."""
    layers = nn.ModuleList()
    for _ in range(count):
        with seeded_modules(seed, "mmrl", tower):
            layers.append(nn.Linear(inputs, outputs))
    return layers


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of the rows of two matrices."""
    return 1 - F.cosine_similarity(one, other, dim=-1).mean()
