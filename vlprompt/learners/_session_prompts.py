"""Learners that choose keys and values of the image tower by what the frozen tower makes of an image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones.edits import BlockEdit, KeysValues
from vlprompt.backbones.vision import Images
from vlprompt.learners._losses import binary_cross_entropy
from vlprompt.learners._session_heads import HeadedSessions

__all__ = ["QueriedPrompts"]


class QueriedPrompts(HeadedSessions):
    """Prompts of keys and values in front of a block's own, chosen or mixed for each image by a query.

    The query is the frozen tower's feature of unit length, (B, d), which costs a second pass. A subclass makes
    :meth:`keys_values` of it, and may add a loss of its keys (:meth:`key_loss`).
    """

    static_images = False
    reads_frozen = True

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

        if "target" in batch:
            losses = {"binary_cross_entropy": binary_cross_entropy(logits, batch["target"])}
        else:
            losses = {"cross_entropy": F.cross_entropy(logits, batch["label"])}
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
