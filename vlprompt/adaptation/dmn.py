"""DMN: a memory of the stream is read by every image anew, and its answer is added to the classifier's.

Paper: Zhang et al., "Dual Memory Networks: A Versatile Adaptation Approach for Vision-Language Models", CVPR 2024,
    arXiv 2403.17589, section 3.2: the dynamic memory, without training images.

The weight of the memory is one number. The authors search it among 13 on the labels of the test images, so their
published figures are no figures of this method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views, confident_mean
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["DynamicMemory"]

_TINY = 1e-24  # squared length below which a sum of keys counts as nothing


@ADAPTERS.register(
    "dmn",
    summary="a memory of earlier images, read anew by every image; online, no gradients",
    paper="2403.17589",
)
class DynamicMemory(StreamAdapter):
    """Probabilities proportional to p + weight * softmax(s <f, m>); m_c is what f reads in the memory of class c.

    m_c is the normalised sum of exp(-sharpness (1 - <f, k>)) k over the keys k of the class, its class weight among
    them. View 0 enters the memory of the class that the mean of the confident views has, before it reads.

    Args:
        learner: See :class:`FeatureAdapter`.
        slots: Images of each class in memory.
        sharpness: Of reading.
        weight: Of what is read; 0 leaves the classifier alone.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        slots: Annotated[int, Field(ge=1)] = 50,
        sharpness: Annotated[float, Field(ge=0)] = 5.5,
        weight: Annotated[float, Field(ge=0)] = 1.0,
        views: Views = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.slots = slots
        self.sharpness = sharpness
        self.weight = weight
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`; the class weight is key 0 of its class, and free slots hold zeros."""
        classes = len(self.weights)
        keys = F.pad(self.weights[:, None], (0, 0, 0, self.slots))
        return {
            "keys": keys,
            # An infinite entropy marks a free slot: any image is more certain.
            "entropy": self.weights.new_full((classes, self.slots), torch.inf),
            # Products of a class's keys with each other, so that no image has to read the keys themselves twice.
            "products": keys @ keys.transpose(1, 2),
        }

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """See :meth:`StreamAdapter.many`."""
        keys = self.memory["keys"]
        entropy = self.memory["entropy"]
        products = self.memory["products"]

        means = confident_mean(logits, confident)
        labels = means.argmax(1).tolist()
        uncertainties = entropies(means)
        images = features[:, 0]
        # Products with the keys, and with the images that may become keys before their turn.
        cosines = (images @ keys.flatten(0, 1).T).view(len(images), *keys.shape[:2])
        between = images @ images.T

        answers = []
        for number, label in enumerate(labels):
            # A free slot comes first, then the least certain image.
            slot = int(entropy[label].argmax())
            if bool(uncertainties[number] < entropy[label, slot]):
                entropy[label, slot] = uncertainties[number]
                keys[label, slot + 1] = images[number]
                cosines[number:, label, slot + 1] = between[number:, number]
                products[label, slot + 1] = cosines[number, label]
                products[label, :, slot + 1] = cosines[number, label]

            # The cosine of f and sum a k is sum a <f, k> / |sum a k|. Keys of free slots are zero and add nothing.
            own = cosines[number]
            affinity = (self.sharpness * (own - 1)).exp()
            lengths = (torch.bmm(products, affinity[..., None])[..., 0] * affinity).sum(1)
            answers.append((affinity * own).sum(1) / lengths.clamp(min=_TINY).sqrt())

        read = torch.stack(answers)
        probs = logits[:, 0].softmax(1) + self.weight * (self.scale * read).softmax(1)
        return list(zip(probs / (1 + self.weight), read, strict=True))
