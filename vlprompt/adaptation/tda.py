"""TDA: two small caches of earlier images, filled as the stream goes by, correct the classifier.

Papers: Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models", CVPR 2024, arXiv 2403.18293,
    section 3; with ``boost`` Zhang et al., "BoostAdapter", NeurIPS 2024, arXiv 2410.15430, section 3.

As published, and worth knowing: the entropy that the negative cache looks at is in nats divided by log2 of the
number of classes, so that it ends at 0.69; the mean feature of several views is not normalised again; alpha and beta
of the paper's tables are per data set. A prediction depends on the images before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.base import Adapter, EncodedViews
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

    A key k votes exp(-beta (1 - <f, k>)) for its class; a negative key against all classes that were neither
    unlikely nor certain for it. Caches are updated before predicting; a full class gives up its least certain key.

    Args:
        learner: See :class:`Adapter`.
        views: V, including the image itself; above 1 the confident views' mean stands for the image.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Of the views that are averaged, the most confident ones.
        slots: Keys per class of the positive cache.
        alpha: Weight of the positive cache; 0 switches it off.
        beta: Its sharpness.
        negative_slots: Keys per class of the negative cache.
        negative_alpha: Weight of the negative cache; 0 switches it off.
        negative_beta: Its sharpness.
        uncertain: Between which entropies, in nats / log2 C, an image enters the negative cache.
        unlikely: Probability above which a class is voted against.
        boost: Add the image's own confident views to a throw-away copy of the positive cache (BoostAdapter);
            needs ``views`` above 1.
        boost_slots: Keys per class this copy has on top of ``slots``.
    """

    episodic = False

    def __init__(
        self,
        learner: Learner,
        *,
        views: Annotated[int, Field(ge=1)] = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
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
        self.share, self.slots, self.negative_slots = share, slots, negative_slots
        self.alpha, self.beta = alpha, beta
        self.negative_alpha, self.negative_beta = negative_alpha, negative_beta
        self.uncertain, self.unlikely = uncertain, unlikely
        self.boost, self.boost_slots = boost, boost_slots
        self.reset()

    def reset(self) -> None:
        """Empty both caches."""
        classes, width, device = len(self.classnames), self.backbone.dim, self.backbone.device
        self.keys = torch.zeros(classes, self.slots, width, device=device)
        self.entropy = torch.full((classes, self.slots), torch.inf, device=device)  # inf: a free slot
        self.negative_keys = torch.zeros(classes, self.negative_slots, width, device=device)
        self.negative_entropy = torch.full((classes, self.negative_slots), torch.inf, device=device)
        shape = (classes, self.negative_slots, classes)
        self.negative_classes = torch.zeros(shape, dtype=torch.bool, device=device)

    _STATE = ("keys", "entropy", "negative_keys", "negative_entropy", "negative_classes")

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Adapter.state`."""
        return {name: getattr(self, name).clone() for name in self._STATE}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Adapter.load_state`."""
        own = self.state()
        wrong = [
            n for n in {*own, *state} if n not in own or n not in state or own[n].shape != state[n].shape
        ]
        if wrong:
            raise CheckpointError(f"this state does not fit {self.method}: {', '.join(sorted(wrong))}.")
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.backbone.device).clone())

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> tuple[Tensor, Tensor]:
        """See :meth:`Adapter.adapt`; images are taken in order."""
        logits = self.view_logits(views.embeddings)
        kept = lowest_entropy(logits, self.share)
        features = F.normalize(views.embeddings, dim=-1)
        rows = [self._one(f, z, k) for f, z, k in zip(features, logits, kept, strict=True)]
        return torch.stack(rows).softmax(-1), kept

    def _one(self, features: Tensor, logits: Tensor, kept: Tensor) -> Tensor:
        """Update the caches with one image's (V, d) features and (V, C) logits; return its (C,) logits."""
        feature, mean = features[kept].mean(0), logits[kept].mean(0)
        probs, uncertainty = logits[kept].softmax(-1).mean(0), marginal_entropy(logits[kept])
        predicted = int(mean.argmax())
        _offer(self.keys, self.entropy, predicted, feature, uncertainty)
        low, high = self.uncertain
        if low < float(uncertainty) / math.log2(len(self.classnames)) < high:
            slot = _offer(self.negative_keys, self.negative_entropy, predicted, feature, uncertainty)
            if slot is not None:
                self.negative_classes[predicted, slot] = (probs > self.unlikely) & (probs < 1)
        keys, entropy = self.keys, self.entropy
        if self.boost and len(features) > 1:
            keys, entropy = self._boosted(features[kept], logits[kept])
        votes = self.alpha * _similarity(feature, keys, entropy, self.beta).sum(1)
        against = _similarity(feature, self.negative_keys, self.negative_entropy, self.negative_beta)
        against = torch.einsum("cs,csk->k", against, self.negative_classes.to(against))
        return mean + votes - self.negative_alpha * against

    def _boosted(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return a copy of the positive cache with an image's confident views in it."""
        keys = F.pad(self.keys, (0, 0, 0, self.boost_slots))
        entropy = F.pad(self.entropy, (0, self.boost_slots), value=torch.inf)
        for feature, row, uncertainty in zip(features, logits, entropies(logits), strict=True):
            _offer(keys, entropy, int(row.argmax()), feature, uncertainty)
        return keys, entropy


def _offer(keys: Tensor, entropy: Tensor, predicted: int, feature: Tensor, uncertainty: Tensor) -> int | None:
    """Put a key into its class's free slot, or in the place of a less certain one; return where it went."""
    worst = int(entropy[predicted].argmax())
    if not bool(uncertainty < entropy[predicted, worst]):
        return None
    keys[predicted, worst], entropy[predicted, worst] = feature, uncertainty
    return worst


def _similarity(feature: Tensor, keys: Tensor, entropy: Tensor, beta: float) -> Tensor:
    """Return (C, slots) exp(-beta (1 - <f, k>)), 0 for free slots."""
    return (-beta * (1 - keys @ feature)).exp() * entropy.isfinite()
