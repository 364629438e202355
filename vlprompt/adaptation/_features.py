"""What methods on features share: class weights, the feature that stands for an image, a memory of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation.base import Adapted, Adapter, EncodedViews
from vlprompt.adaptation.selection import lowest_entropy
from vlprompt.adaptation.views import ViewPlan
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.learners import Learner

__all__ = ["FeatureAdapter", "Share", "StreamAdapter", "Views", "confident_mean"]

Views = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


def confident_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Return the (B, n) mean of the kept rows of (B, V, n), by a (B, V) mask."""
    weights = mask.to(rows)[..., None]
    return (rows * weights).sum(1) / weights.sum(1)


class FeatureAdapter(Adapter):
    """Base of methods that compare image features with class weights and run no tower.

    Args:
        learner: Its class weights are the start.
        plan: How views are made.
        share: Share of the views that represent an image, the most confident ones.

    Attributes:
        weights: (C, d) unit-length class weights.
        scale: What cosines are multiplied by.

    Raises:
        DataError: If the learner classifies by more than class weights.
    """

    def __init__(self, learner: Learner, plan: ViewPlan, share: float) -> None:
        super().__init__(learner, plan)
        self.share = share
        if type(learner).logits is not Learner.logits:
            raise DataError(
                f"{learner.method or type(learner).__name__} classifies by more than class weights, which this method "
                "moves. Start from a backbone, or from a learner of prompts."
            )
        with torch.no_grad():
            self.weights = learner.class_weights().float()
        self.scale = float(self.backbone.logit_scale)

    def opened(self, views: EncodedViews) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, V, d) unit features, their (B, V, C) logits and the (B, V) mask of the most confident views."""
        features = F.normalize(views.embeddings.float(), dim=-1)
        # Image by image, so that the other images change no bit.
        logits = torch.stack([self.scale * rows @ self.weights.T for rows in features])
        return features, logits, lowest_entropy(logits, self.share)

    def one_feature(self, views: EncodedViews) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, d) unit features that stand for images, (B, C) logits and the (B, V) mask of the views used."""
        features, _, mask = self.opened(views)
        weighted = mask.to(features)[..., None]
        means = F.normalize((features * weighted).sum(1), dim=-1)
        return means, self.scale * means @ self.weights.T, mask


class StreamAdapter(FeatureAdapter):
    """Base of methods with a memory of the stream; a method defines :meth:`empty`, and :meth:`one` or :meth:`many`.

    Attributes:
        memory: Everything learned from the stream, float32 tensors (counts, masks and numbers in their own types).
    """

    granularity = "stream"

    def __init__(self, learner: Learner, plan: ViewPlan, share: float) -> None:
        super().__init__(learner, plan, share)
        self.memory: dict[str, Tensor] = {}

    def empty(self) -> dict[str, Tensor]:
        """Return the memory before the first image."""
        raise NotImplementedError

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learn from one image and name it.

        Args:
            features: (V, d), unit length.
            logits: (V, C).
            confident: (V,) mask of the most confident views.

        Returns:
            (C,) probabilities, and (C,) cosines with adapted class weights or None.
        """
        raise NotImplementedError

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Learn from B images in their order and name each (see :meth:`one`).

        A method that overrides this computes for all of them at once what does not depend on the order.

        Args:
            features: (B, V, d), unit length.
            logits: (B, V, C).
            confident: (B, V) mask of the most confident views.
        """
        return [self.one(*parts) for parts in zip(features, logits, confident, strict=True)]

    def reset(self) -> None:
        """See :meth:`Adapter.reset`."""
        self.memory = self.empty()

    def learned(self) -> dict[str, Tensor]:
        """See :meth:`Adapter.learned`."""
        return {name: tensor.clone() for name, tensor in self.memory.items()}

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """See :meth:`Adapter.restore`."""
        expected = self.empty()
        wrong = [
            name
            for name in {*expected, *learned}
            if not self.fits(name, expected.get(name), learned.get(name))
        ]
        if wrong:
            raise CheckpointError(f"this state does not fit {self.method}: {', '.join(sorted(wrong))}.")
        self.memory = {name: tensor.to(self.weights.device).clone() for name, tensor in learned.items()}

    def fits(self, name: str, expected: Tensor | None, tensor: Tensor | None) -> bool:
        """Return whether a tensor of a state can be taken for one of the empty memory."""
        if expected is None or tensor is None:
            return False
        return expected.shape == tensor.shape and expected.dtype == tensor.dtype

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`; images are taken in order."""
        features, logits, mask = self.opened(views)
        probs = []
        similarities = []
        for row, cosines in self.many(features, logits, mask):
            probs.append(row)
            if cosines is not None:
                similarities.append(cosines)
        return Adapted(torch.stack(probs), mask, torch.stack(similarities) if similarities else None)
