"""TDA: two small caches of earlier images correct the classifier; the stream fills them.

Papers: Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024, arXiv 2403.18293,
    section 3; with ``boost`` Zhang et al., "BoostAdapter", NeurIPS 2024, arXiv 2410.15430, section 3.

As published, and easily overlooked: the entropy that decides about the negative cache is in nats, divided by log2 of
the number of classes, so its maximum is 0.69; the mean feature of several views is not normalised again; alpha and
beta in the paper's tables are chosen for each data set. A prediction depends on the images before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.base import Adapted, Adapter, EncodedViews
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import entropies, lowest_entropy
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.core.errors import CheckpointError
from vlprompt.learners import Learner

__all__ = ["DynamicAdapter"]

Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@ADAPTERS.register(
    "tda",
    summary="caches of confident and of uncertain earlier images; online, no gradients",
    paper="2403.18293",
)
class DynamicAdapter(Adapter):
    """Logits + alpha * votes of the positive cache - negative_alpha * votes of the negative cache.

    A key k votes exp(-beta (1 - <f, k>)) for its class. A negative key votes against all classes that were neither
    unlikely nor certain for its image. Caches are updated before the prediction; a full class drops its least certain
    key.

    Args:
        learner: See :class:`Adapter`.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that are averaged, the most confident ones.
        query: What represents the image in the caches and in the prediction: the mean of its confident views, or the
            image itself (BoostAdapter on fine-grained and corrupted images). ``boost`` adds confident views either
            way.
        slots: Keys per class of the positive cache.
        alpha: Weight of the positive cache; 0 switches it off.
        beta: Its sharpness.
        negative_slots: Keys per class of the negative cache.
        negative_alpha: Weight of the negative cache; 0 switches it off.
        negative_beta: Its sharpness.
        uncertain: Lowest and highest entropy, in nats / log2 C, at which an image enters the negative cache.
        unlikely: Probability above which a class is voted against.
        boost: Add the confident views of the image to a temporary copy of the positive cache (BoostAdapter); needs
            ``views`` above 1.
        boost_slots: Keys per class that this copy has in addition to ``slots``.
    """

    granularity = "stream"

    def __init__(
        self,
        learner: Learner,
        *,
        views: Annotated[int, Field(ge=1)] = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
        query: Literal["confident", "image"] = "confident",
        slots: Annotated[int, Field(ge=1)] = 3,
        alpha: Weight = 2.0,
        beta: Weight = 5.0,
        negative_slots: Annotated[int, Field(ge=1)] = 2,
        negative_alpha: Weight = 0.117,
        negative_beta: Weight = 1.0,
        uncertain: tuple[Fraction, Fraction] = (0.2, 0.5),
        unlikely: Fraction = 0.03,
        boost: bool = False,
        boost_slots: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed))
        self.share = share
        self.query = query
        self.slots = slots
        self.alpha = alpha
        self.beta = beta
        self.negative_slots = negative_slots
        self.negative_alpha = negative_alpha
        self.negative_beta = negative_beta
        self.uncertain = uncertain
        self.unlikely = unlikely
        self.boost = boost
        self.boost_slots = boost_slots
        self.reset()

    def reset(self) -> None:
        """Empty both caches."""
        classes = len(self.classnames)
        width = self.backbone.dim
        device = self.backbone.device

        # An infinite entropy marks a free slot: any key is more certain.
        self.keys = torch.zeros(classes, self.slots, width, device=device)
        self.entropy = torch.full((classes, self.slots), torch.inf, device=device)

        self.negative_keys = torch.zeros(classes, self.negative_slots, width, device=device)
        self.negative_entropy = torch.full((classes, self.negative_slots), torch.inf, device=device)
        shape = (classes, self.negative_slots, classes)
        self.negative_classes = torch.zeros(shape, dtype=torch.bool, device=device)

    def learned(self) -> dict[str, Tensor]:
        """See :meth:`Adapter.learned`."""
        return {
            "keys": self.keys.clone(),
            "entropy": self.entropy.clone(),
            "negative_keys": self.negative_keys.clone(),
            "negative_entropy": self.negative_entropy.clone(),
            "negative_classes": self.negative_classes.clone(),
        }

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """See :meth:`Adapter.restore`."""
        expected = {name: tensor.shape for name, tensor in self.learned().items()}
        shapes = {name: tensor.shape for name, tensor in learned.items()}
        wrong = [name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name)]
        if wrong:
            raise CheckpointError(f"this state does not fit {self.method}: {', '.join(sorted(wrong))}.")

        tensors = {name: tensor.to(self.backbone.device).clone() for name, tensor in learned.items()}
        self.keys = tensors["keys"]
        self.entropy = tensors["entropy"]
        self.negative_keys = tensors["negative_keys"]
        self.negative_entropy = tensors["negative_entropy"]
        self.negative_classes = tensors["negative_classes"]

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`; images are taken in order."""
        logits = self.view_logits(views.embeddings)
        mask = lowest_entropy(logits, self.share)
        features = F.normalize(views.embeddings, dim=-1)

        # One by one: an image's caches hold the images before it, also those of its own batch.
        rows = []
        for parts in zip(features, logits, mask, strict=True):
            rows.append(self._one(*parts))
        return Adapted(torch.stack(rows).softmax(-1), mask)

    def _one(self, features: Tensor, logits: Tensor, confident: Tensor) -> Tensor:
        """Update the caches with one image, and return its logits.

        Args:
            features: (V, d), unit length.
            logits: (V, C).
            confident: (V,) mask of the most confident views.

        Returns:
            (C,).
        """
        represents = confident
        if self.query == "image":
            represents = torch.zeros_like(confident)
            represents[0] = True

        feature = features[represents].mean(0)
        mean = logits[represents].mean(0)
        probs = logits[represents].softmax(-1).mean(0)
        uncertainty = marginal_entropy(logits[represents])
        predicted = int(mean.argmax())

        _offer(self.keys, self.entropy, predicted, feature, uncertainty)

        # Only images of middling uncertainty tell which classes an image is not of.
        low, high = self.uncertain
        if low < float(uncertainty) / math.log2(len(self.classnames)) < high:
            slot = _offer(self.negative_keys, self.negative_entropy, predicted, feature, uncertainty)
            if slot is not None:
                self.negative_classes[predicted, slot] = (probs > self.unlikely) & (probs < 1)

        # The views of this image must not stay in the cache, so they go into a copy.
        keys = self.keys
        entropy = self.entropy
        if self.boost and len(features) > 1:
            keys, entropy = self._boosted(features[confident], logits[confident])

        votes = self.alpha * _similarity(feature, keys, entropy, self.beta).sum(1)
        against = _similarity(feature, self.negative_keys, self.negative_entropy, self.negative_beta)
        against = torch.einsum("cs,csk->k", against, self.negative_classes.to(against))
        return mean + votes - self.negative_alpha * against

    def _boosted(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and entropies of a copy of the positive cache to which an image's confident views were added."""
        keys = F.pad(self.keys, (0, 0, 0, self.boost_slots))
        entropy = F.pad(self.entropy, (0, self.boost_slots), value=torch.inf)
        for feature, row, uncertainty in zip(features, logits, entropies(logits), strict=True):
            _offer(keys, entropy, int(row.argmax()), feature, uncertainty)
        return keys, entropy


def _offer(keys: Tensor, entropy: Tensor, predicted: int, feature: Tensor, uncertainty: Tensor) -> int | None:
    """Put a key into a free slot of its class, or replace a less certain key; return the slot, or None."""
    # A free slot has infinite entropy, so it is the least certain one.
    worst = int(entropy[predicted].argmax())
    if not bool(uncertainty < entropy[predicted, worst]):
        return None

    keys[predicted, worst] = feature
    entropy[predicted, worst] = uncertainty
    return worst


def _similarity(feature: Tensor, keys: Tensor, entropy: Tensor, beta: float) -> Tensor:
    """Return (C, slots) exp(-beta (1 - <f, k>)), 0 for free slots."""
    return (-beta * (1 - keys @ feature)).exp() * entropy.isfinite()
