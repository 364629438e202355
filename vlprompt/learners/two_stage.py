"""2SFS: first the norms of both towers, then a linear classifier that starts at the tuned texts.

Paper: Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", CVPR 2025, arXiv
2503.11609, section 4.

What is learned of a norm is its distance from the frozen one, and weight decay pulls that to zero; the authors' code
decays the scale itself (by 2e-6 of it per step). Their code hands the norms outside of the blocks to the optimiser but
leaves them frozen; here they are left alone unless ``outer_norms`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit, NormDelta, shifted_norms
from vlprompt.backbones.layout import PromptLayout
from vlprompt.backbones.vision import Images
from vlprompt.core.trainable import Phase
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["TwoStage"]

_FIRST, _SECOND = 0, 1


class TowerNorms(nn.Module):
    """The shifts of one tower's norms.

    Args:
        blocks: The two norms of every block.
        outer: Norms outside of the blocks.
    """

    def __init__(
        self, blocks: Sequence[tuple[nn.LayerNorm, nn.LayerNorm]], outer: Sequence[nn.LayerNorm]
    ) -> None:
        super().__init__()
        self.first = nn.ModuleList(NormDelta(norm.normalized_shape[0]) for norm, _ in blocks)
        self.second = nn.ModuleList(NormDelta(norm.normalized_shape[0]) for _, norm in blocks)
        self.outer = nn.ModuleList(NormDelta(norm.normalized_shape[0]) for norm in outer)
        self._outer_norms = tuple(outer)  # a tuple, so that frozen parts are not registered as parts of this

    def shifted(self) -> AbstractContextManager[None]:
        """Return the context in which the norms outside of the blocks are shifted."""
        if not self._outer_norms:
            return nullcontext()
        return shifted_norms(list(zip(self._outer_norms, self.outer, strict=True)))  # type: ignore[arg-type]

    def edits(self) -> list[BlockEdit]:
        """Return the edit of every block."""
        pairs = zip(self.first, self.second, strict=True)
        return [BlockEdit(first_norm=first, second_norm=second) for first, second in pairs]  # type: ignore[arg-type]


@LEARNERS.register(
    "two_stage",
    summary="norms of both towers, then a classifier that starts at their texts",
    paper="2503.11609",
    needs=("text", "vision"),
)
class TwoStage(Learner):
    """Two phases: the scale and offset of every block's LayerNorms; then (C, d) class vectors on the frozen result.

    Classes it was trained on are named by their vectors, others by the tuned text tower. It starts as zero-shot
    classification with the first template. Trained by anything but the trainer's phases, both parts learn at once.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: The first makes the sentences.
        share: Of the optimiser steps that the norms get (section 4.2).
        outer_norms: Learn the norms outside of the blocks too, which the published code leaves frozen.
        head_classes: Classes with a vector of their own; None: all. A learner that was brought to other classes has it.

    Raises:
        BackboneError: If a tower has no blocks that begin with a LayerNorm and can be run by hand.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe(
        {
            "lr": 2e-4,
            "batch_size": 32,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "schedule": "cosine",
            "final_lr": 1e-6,
            "warmup_epochs": 0.0,
            "drop_last": False,
        },
        steps_per_shot=300,
        steps=100,
        trial_steps=30,
    )

    static_images = False
    head_rule = "each"
    head_bound = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        share: Annotated[float, Field(ge=0, le=1)] = 0.6,
        outer_norms: bool = False,
        head_classes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.keep_head(head_classes)
        self.share = share
        self._stage: int | None = None

        text = backbone.text
        vision = backbone.vision
        text.require_edits()
        vision.require_edits()
        self.text = TowerNorms(text.block_norms(), text.outer_norms() if outer_norms else ())
        self.vision = TowerNorms(vision.block_norms(), vision.outer_norms() if outer_norms else ())

        # Python's own lists: where a place is None belongs to the class list, not to what is learned.
        self._places = self.head_places
        self.layout = self._lay_out(self.classnames)
        headless = [n for n, place in zip(self.classnames, self._places, strict=True) if place is None]
        self.headless_layout = self._lay_out(headless) if headless else None

        known = self.layout if self.head_classes == self.classnames else self._lay_out(self.head_classes)
        with torch.no_grad():
            self.head = nn.Parameter(F.normalize(text.encode(known), dim=-1))  # (C, d)

    # --- the classifier

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`: the head's vectors, and texts of classes it doesn't know."""
        if self.headless_layout is None:
            return self.head[self._places]

        texts = iter(F.normalize(self._texts(self.headless_layout), dim=-1))
        return torch.stack([next(texts) if place is None else self.head[place] for place in self._places])

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem; every block has norms that learn."""
        return 1

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`; without a graph while the head alone learns."""
        still = torch.no_grad() if self._stage == _SECOND else nullcontext()
        with still, self.vision.shifted():
            return self.backbone.image_embeddings(images, adapters=self.vision.edits())

    def _texts(self, layout: PromptLayout) -> Tensor:
        """Return (C, d) features of the tuned text tower."""
        with self.text.shifted():
            return self.backbone.text.encode(layout, adapters=self.text.edits())

    # --- training

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross entropy of the phase: against the tuned texts in the first, against the head in the second.

        Outside of phases ``head_cross_entropy`` stands beside the first.
        """
        features = F.normalize(self.embed_images(batch["image"]), dim=-1)

        def cross_entropy(weights: Tensor) -> Tensor:
            logits = self.backbone.logit_scale * features @ F.normalize(weights, dim=-1).T
            return F.cross_entropy(logits, batch["label"])

        if self._stage == _SECOND:
            return {"cross_entropy": cross_entropy(self.class_embeddings())}

        losses = {"cross_entropy": cross_entropy(self._texts(self.layout))}
        if self._stage is None:
            losses["head_cross_entropy"] = cross_entropy(self.class_embeddings())
        return losses

    def phases(self) -> list[Phase]:
        """See :meth:`Hooks.phases`: the norms, then the head."""
        norms = tuple(name for name in self.learned_parameters() if name != "head")
        return [Phase(norms, self.share), Phase(("head",), 1 - self.share)]

    def enter_phase(self, number: int, is_new: bool) -> None:
        """See :meth:`Hooks.enter_phase`: the head starts at the tuned texts."""
        if number == _SECOND and is_new:
            self._start_head()
        self._stage = number

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Let the head be the tuned texts while the norms learn, so that what is validated is what they are."""
        if self._stage == _FIRST:
            self._start_head()

    def after_training(self) -> None:
        """Leave the phases."""
        self._stage = None

    @torch.no_grad()
    def _start_head(self) -> None:
        """Put the tuned texts into the head."""
        texts = F.normalize(self._texts(self.layout), dim=-1)
        for place, text in zip(self._places, texts, strict=True):
            if place is not None:
                self.head[place] = text
        self._cached_weights = None

    # --- parts

    def _lay_out(self, classnames: Sequence[str]) -> PromptLayout:
        tower = self.backbone.text
        sentences = [tower.sentence(self.templates[0].format(name)) for name in classnames]
        return tower.layout(sentences, classnames)
