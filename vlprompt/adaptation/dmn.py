"""DMN: a memory of the stream is read by every image anew, and its answer is added to the classifier's.

Paper: Zhang et al., "Dual Memory Networks: A Versatile Adaptation Approach for Vision-Language Models", CVPR 2024,
    arXiv 2403.17589, section 3.2: the dynamic memory, without training images.

The weight of the memory is one number. The authors search it among 13 on the labels of the test images, so their
published figures are no figures of this method.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["DynamicMemory"]


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
        """See :meth:`StreamAdapter.empty`."""
        classes = len(self.weights)
        return {
            # The class weight stands before the images.
            "keys": F.pad(self.weights[:, None], (0, 0, 0, self.slots)),
            # An infinite entropy marks a free slot: any image is more certain.
            "entropy": self.weights.new_full((classes, self.slots), torch.inf),
        }

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        keys = self.memory["keys"]
        entropy = self.memory["entropy"]
        mean = logits[confident].mean(0)
        label = int(mean.argmax())
        uncertainty = entropies(mean)

        # A free slot comes first, then the least certain image.
        slot = int(entropy[label].argmax())
        if bool(uncertainty < entropy[label, slot]):
            keys[label, slot + 1] = features[0]
            entropy[label, slot] = uncertainty

        # Slots are filled from the front, so what lies behind the fullest class is empty.
        used = 1 + int(entropy.isfinite().sum(1).max())
        keys = keys[:, :used]
        affinity = (-self.sharpness * (1 - keys @ features[0])).exp()
        affinity[:, 1:] *= entropy[:, : used - 1].isfinite()
        read = F.normalize((affinity[:, None] @ keys)[:, 0], dim=1)
        cosines = read @ features[0]
        probs = logits[0].softmax(0) + self.weight * (self.scale * cosines).softmax(0)
        return probs / (1 + self.weight), cosines
