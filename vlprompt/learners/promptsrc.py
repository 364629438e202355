"""PromptSRC: deep prompts in both towers that stay near the frozen model and are averaged over epochs.

Paper: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023, arXiv
2307.06948, section 3. Unlike the authors' code, the averaging touches prompts only, in float32: averaging the whole
model in half precision also moves frozen weights by rounding.
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
from vlprompt.backbones.base import means_of
from vlprompt.core.descriptions import class_texts
from vlprompt.learners import LEARNERS
from vlprompt.learners._offsets import OffsetOptions
from vlprompt.learners._templates import IMAGENET_TEMPLATES
from vlprompt.learners._unified import DualPrompts
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["PromptSRC", "gaussian_weights"]


def gaussian_weights(epochs: int, mean: float, std: float) -> Tensor:
    """Return (E,) float64 weights of epochs 1 .. E: a Gaussian's density, normalised to sum 1 (section 3.3)."""
    distance = (torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std
    return torch.softmax(-0.5 * distance**2, dim=0)  # densities themselves underflow far from the mean


@LEARNERS.register(
    "promptsrc",
    summary="IVLP held near the frozen model, prompts averaged over epochs",
    paper="2307.06948",
    needs=("text", "vision", "teacher"),
)
class PromptSRC(DualPrompts):
    """IVLP with three consistency losses against the frozen model, and Gaussian prompt averaging.

    The averaged prompts replace the last ones after training, so train with ``select="last"``.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; used with ``teacher="templates"``.
        context_length: Learned tokens per text layer; with ``init`` the first of the phrase.
        visual_length: Learned tokens per image layer.
        text_depth: Prompted text layers, at most all the tower has.
        visual_depth: Prompted image layers, at most all the tower has.
        init: The phrase before the class name; tokens after ``context_length`` stay as written. Empty: random.
        text_weight: Of mean |w - w0|.
        image_weight: Of mean |f - f0|.
        logit_weight: Of KL(p0 || p), averaged over batch and classes.
        teacher: Sentences of w0: the 60 ImageNet ones of the paper, or the learner's own templates.
        normalise_first: Normalise each sentence's feature before averaging into w0; the authors' code doesn't.
        average: Gaussian prompt averaging.
        average_mean: In epochs, counted from 1; 15 belongs to 20 epochs.
        average_std: In epochs.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of all random starts.

    Raises:
        BackboneError: If prompts can't enter one of the backbone's towers.
        DataError: If the phrase has fewer tokens than ``context_length``.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.0025, "batch_size": 4, "epochs": 20}, steps=100, trial_steps=30)

    reads_frozen = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        visual_length: Annotated[int, Field(ge=1, le=256)] = 4,
        text_depth: Annotated[int, Field(ge=1)] = 9,
        visual_depth: Annotated[int, Field(ge=1)] = 9,
        init: str = "a photo of a",
        text_weight: Annotated[float, Field(ge=0)] = 25.0,
        image_weight: Annotated[float, Field(ge=0)] = 10.0,
        logit_weight: Annotated[float, Field(ge=0)] = 1.0,
        teacher: Literal["imagenet", "templates"] = "imagenet",
        normalise_first: bool = False,
        average: bool = True,
        average_mean: float = 15.0,
        average_std: Annotated[float, Field(gt=0)] = 1.0,
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
            visual_length=visual_length,
            text_depth=text_depth,
            visual_depth=visual_depth,
            init=init,
            attributes=attributes,
            attribute_length=attribute_length,
            offsets=offsets,
            seed=seed,
        )
        self.text_weight = text_weight
        self.image_weight = image_weight
        self.logit_weight = logit_weight
        self.teacher_templates = IMAGENET_TEMPLATES if teacher == "imagenet" else self.templates
        self.normalise_first = normalise_first
        self.average = average
        self.average_mean = average_mean
        self.average_std = average_std

        self._teacher_weights: Tensor | None = None
        self._averaged: dict[str, Tensor] = {}

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return cross entropy and the three consistency losses (sections 3.2 and 3.4) of a batch of pixels."""
        tau = self.backbone.logit_scale

        weights = self.class_weights()
        features = F.normalize(self.batch_embeddings(batch), dim=-1)
        logits = tau * features @ weights.T

        frozen_weights = self.teacher_weights()
        frozen = batch.get("frozen")
        if frozen is None:
            frozen = self.backbone.image_embeddings(batch["image"])
        frozen_features = F.normalize(frozen, dim=-1)
        frozen_logits = tau * frozen_features @ frozen_weights.T

        divergence = F.kl_div(
            logits.log_softmax(-1), frozen_logits.log_softmax(-1), reduction="none", log_target=True
        )
        return {
            "cross_entropy": F.cross_entropy(logits, batch["label"]),
            "scl_text": self.text_weight * F.l1_loss(weights, frozen_weights),
            "scl_image": self.image_weight * F.l1_loss(features, frozen_features),
            "scl_logits": self.logit_weight * divergence.mean(),
        }

    def teacher_weights(self) -> Tensor:
        """Return w0: (C, d) unit-length weights of the frozen model; computed when training first asks."""
        if self._teacher_weights is not None:
            return self._teacher_weights

        texts = [class_texts(name, self.teacher_templates) for name in self.classnames]
        features = self.backbone.text.encode_strings([text for of_class in texts for text in of_class])
        if self.normalise_first:
            features = F.normalize(features, dim=-1)
        self._teacher_weights = F.normalize(means_of(features, [len(t) for t in texts]), dim=-1)
        return self._teacher_weights

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Add this epoch's prompts to the average."""
        if not self.average:
            return

        share = float(gaussian_weights(epochs, self.average_mean, self.average_std)[epoch])
        past = self._averaged if epoch else {}

        averaged = {}
        for name, tensor in self.trainable_state().items():
            averaged[name] = share * tensor + (past[name] if past else 0)
        self._averaged = averaged

    def after_training(self) -> None:
        """Put the average in place of the last epoch's prompts."""
        if self._averaged:
            self.load_trainable_state(self._averaged)

    def running_state(self) -> dict[str, Tensor]:
        """Return the unfinished average, for a checkpoint."""
        return self._averaged

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue an average from a checkpoint."""
        self._averaged = {name: tensor.to(self.context.device) for name, tensor in state.items()}
