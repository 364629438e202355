"""CLIPTTA: normalisation layers are tuned by a contrastive loss of images and their predictions.

Paper: Lafon et al., "CLIPTTA: Robust Contrastive Vision-Language Test-Time Adaptation", NeurIPS 2025, arXiv 2507.14312,
    section 3.

The loss has the form of CLIP's training: each image chooses among the sentences of all images in its batch. Where
several images have the same prediction, the choice between their equal sentences stays open, which keeps a batch from
collapsing into one class. The paper has a second half, sentences that choose among images; its code computes the
first half twice unless the text tower is tuned, which it is not here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._norm_tuning import Batch, NormAdapter, NormRule, Optimizer, Steps
from vlprompt.adaptation._tuning import Rate
from vlprompt.adaptation.base import ResetScope
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.core.seeding import torch_rng
from vlprompt.data.transforms import affine_of
from vlprompt.learners import Learner

__all__ = ["ContrastiveAdaptation"]

_PIXELS, _LABELS, _CONFIDENCE, _DRAWS = "memory/pixels", "memory/labels", "memory/confidence", "memory/draws"


@ADAPTERS.register(
    "cliptta",
    summary="tunes normalisation layers of the image tower by CLIP's contrastive loss on its own predictions",
    paper="2507.14312",
    needs=("image gradients",),
)
class ContrastiveAdaptation(NormAdapter):
    """Minimise the contrast of a batch and of remembered images, and spread predictions over the classes.

    With k_i the predicted class of image i, row i of Q is the softmax over j of the logits of image i and class k_j.
    The loss is the mean entropy of the rows of Q minus ``diversity`` times the entropy of the mean prediction, of the
    batch and once more of images from a memory, which keeps the most confident images of each class.

    Args:
        learner: See :class:`NormAdapter`.
        batch: See :class:`NormAdapter`.
        steps: Updates per batch.
        lr: Learning rate.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        weight_decay: Of all optimisers.
        diversity: Weight of the entropy of the mean prediction (the paper's lambda).
        slots: Remembered images of each class; 0 for no memory. The paper has 4 for ten classes, 16 for more.
        sample: Remembered images that a step sees, equally many of each class, at least one.
        seed: Of the draws of remembered images.
        reset_scope: See :class:`NormAdapter`; the memory is forgotten too.
        updates_first: See :class:`NormAdapter`.
        batch_statistics: See :class:`NormAdapter`.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        batch: Batch = 128,
        steps: Steps = 10,
        lr: Rate = 1e-4,
        optimizer: Optimizer = "adam",
        weight_decay: Rate = 0.0,
        diversity: Annotated[float, Field(ge=0)] = 1.0,
        slots: Annotated[int, Field(ge=0)] = 4,
        sample: Annotated[int, Field(ge=1)] = 40,
        seed: int = 0,
        reset_scope: ResetScope = "corruption",
        updates_first: bool = True,
        batch_statistics: bool = False,
    ) -> None:
        self.diversity = diversity
        self.slots = slots
        self.sample = sample
        self.seed = seed
        super().__init__(
            learner,
            NormRule(steps, lr, optimizer, weight_decay=weight_decay),
            batch=batch,
            reset_scope=reset_scope,
            updates_first=updates_first,
            batch_statistics=batch_statistics,
        )

    def loss(self, images: Tensor, step: int) -> Tensor:
        """See :meth:`NormAdapter.loss`."""
        logits = self.logits(images)
        loss = self.contrast(logits)
        if not self.slots:
            return loss

        if step == 0:
            self._remember(images, logits.detach())
        return loss + self.contrast(self.logits(self._recall().to(images)))

    def contrast(self, logits: Tensor) -> Tensor:
        """Return the loss of (B, C) logits."""
        # Column j is the sentence of image j.
        pairs = logits[:, logits.argmax(1)]
        return marginal_entropy(pairs[:, None]).mean() - self.diversity * marginal_entropy(logits)

    def empty_memory(self) -> dict[str, Tensor]:
        """See :meth:`NormAdapter.empty_memory`: remembered images, their predictions and confidence, draws so far."""
        if not self.slots:
            return {}
        return {
            _PIXELS: self._stored(torch.zeros(0, 3, *self.backbone.image_size)),
            _LABELS: torch.zeros(0, dtype=torch.long),
            _CONFIDENCE: torch.zeros(0),
            _DRAWS: torch.tensor(0),
        }

    def _remember(self, images: Tensor, logits: Tensor) -> None:
        """Take a batch into the memory, and keep of each class what is most confident."""
        # At scale 1, as published.
        confidence, labels = (logits / self.scale).softmax(1).max(1)
        new = {_PIXELS: self._stored(images), _LABELS: labels.cpu(), _CONFIDENCE: confidence.cpu()}
        joined = {name: torch.cat([self.memory[name], tensor]) for name, tensor in new.items()}
        kept = self._first_of_each(joined[_LABELS], joined[_CONFIDENCE], self.slots)
        self.memory |= {name: tensor[kept] for name, tensor in joined.items()}

    def _recall(self) -> Tensor:
        """Return (M, 3, H, W) remembered images, equally many of each class as far as there are."""
        draws = self.memory[_DRAWS]
        self.memory[_DRAWS] = draws + 1
        rng = torch_rng(self.seed, "remembered images", int(draws))

        labels = self.memory[_LABELS]
        each = max(1, min(self.sample // len(self.classnames), self.slots))
        drawn = self._first_of_each(labels, torch.rand(len(labels), generator=rng), each)
        stored = self.memory[_PIXELS][drawn]
        affine = affine_of(self.backbone.preprocess, self.backbone.image_size)
        return stored if affine is None else affine(stored)

    def _first_of_each(self, labels: Tensor, values: Tensor, count: int) -> Tensor:
        """Return the numbers of the ``count`` largest values of every class."""
        order = values.argsort(descending=True, stable=True)
        seen = torch.nn.functional.one_hot(labels[order], len(self.classnames)).cumsum(0)
        rank = seen.gather(1, labels[order][:, None])[:, 0]
        return order[rank <= count]

    def _stored(self, images: Tensor) -> Tensor:
        """Return preprocessed images as bytes, a quarter of the size, where the preparation of bytes can be undone."""
        images = images.detach().cpu()
        affine = affine_of(self.backbone.preprocess, self.backbone.image_size)
        return images if affine is None else affine.undo(images)
