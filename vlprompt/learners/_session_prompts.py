"""Learners that choose keys and values of the image tower by what the frozen tower makes of an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit, KeysValues
from vlprompt.backbones.vision import Images
from vlprompt.learners._session_heads import HeadedSessions, HeadKind
from vlprompt.learners.recipe import Recipe

__all__ = ["QueriedPrompts"]


class QueriedPrompts(HeadedSessions):
    """Prompts of keys and values in front of a block's own, chosen or mixed for each image by a query.

    The query is the frozen tower's feature of unit length, (B, d), which costs a second pass. A subclass makes
    :meth:`keys_values` of it, and may add a loss of its keys (:meth:`key_loss`).

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`HeadedSessions`.
        sessions: See :class:`SessionLearner`.
        head: See :class:`HeadedSessions`.
        seed: See :class:`HeadedSessions`.

    Raises:
        BackboneError: If keys and values can't enter the backbone's image tower.
    """

    recipe = Recipe({"lr": 0.001, "batch_size": 128, "epochs": 50, "optimizer": "adam", "weight_decay": 0.0})
    static_images = False
    reads_frozen = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        sessions: Sequence[Sequence[str]] | None,
        head: HeadKind,
        seed: int,
    ) -> None:
        backbone.vision.require_attention_edits()
        super().__init__(backbone, classnames, templates, sessions, head, backbone.dim, seed)

    @abstractmethod
    def keys_values(self, query: Tensor, learning: bool) -> Mapping[int, KeysValues]:
        """Return what stands in front of the keys of each block that has prompts.

        Args:
            query: (B, d).
            learning: Whether the images are those of the newest session.
        """

    def key_loss(self, query: Tensor) -> Tensor | None:
        """Return what moves the keys to the (B, d) queries of the newest session; None where the loss alone does."""
        return None

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: nothing enters before the first block."""
        return 1

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        return self._embed(images, self._query(images), learning=False)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Learner.loss`; with the loss of the keys, if there is one."""
        images = batch["image"]
        frozen = batch.get("frozen")
        query = self._query(images) if frozen is None else F.normalize(frozen, dim=-1)
        logits = self.logits(self._embed(images, query, learning=True))

        losses = self.classification_loss(logits, batch)
        keys = self.key_loss(query)
        return losses if keys is None else {**losses, "keys": keys}

    @torch.no_grad()
    def _query(self, images: Images) -> Tensor:
        return F.normalize(self.backbone.image_embeddings(images), dim=-1)

    def _embed(self, images: Images, query: Tensor, learning: bool) -> Tensor:
        prompts = self.keys_values(query, learning)
        blocks = range(self.backbone.vision.layers)
        edits = [BlockEdit(keys_values=prompts.get(block)) for block in blocks]
        return self.backbone.image_embeddings(images, adapters=edits)
