"""PromptKD: visual prompts and a projection learn what a tuned teacher says of unlabelled images.

Paper: Li et al., "PromptKD: Unsupervised Prompt Distillation for Vision-Language Models", CVPR 2024, arXiv 2403.02781,
section 3.

It is transductive where the unlabelled images show the classes that are tested: such figures belong beside others of
the kind only. Unlike the authors' code: no label of a validation or test image chooses an epoch; the teacher's classes
are encoded once; learned values are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Images, VisualPrompts
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.names import listed_names, match_classes
from vlprompt.core.seeding import seeded_modules
from vlprompt.core.trainable import misfits
from vlprompt.learners import LEARNERS
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["PromptKD"]

_WEIGHTS = "teacher_weights"
_OF_TEACHER = ("teacher_width", "taught_classes")


@LEARNERS.register(
    "promptkd",
    summary="visual prompts that learn a teacher's answers on unlabelled images",
    paper="2403.02781",
    needs=("vision", "teacher"),
)
class PromptKD(PromptedImages):
    """An image z = P(f) is compared with the teacher's class weights; P is linear, batch norm, ReLU, linear, d -> D.

    The loss is weight T^2 KL(teacher || student) of both softmaxes at temperature T, the mean over images and classes.
    Labels are not read. Without a teacher (:meth:`learn_from`) it is the frozen backbone with the templates itself.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Of the teacher, where that is the backbone itself.
        visual_length: Learned tokens per image layer.
        visual_depth: Prompted image layers, at most all the tower has.
        weight: Of the loss (the paper's 1000; 200 for FGVC Aircraft, Oxford Flowers and DTD). The mean is over classes
            too, so that 1000 with C classes is 1000 / C for an image.
        temperature: T.
        teacher_width: D of a teacher with another backbone; None: that of the backbone. :meth:`learn_from` sets it.
        taught_classes: The classes whose weights a teacher gave; None: the teacher is the backbone. Set alike.
        seed: Of all random starts.

    Raises:
        BackboneError: If prompts can't enter the image tower.
        DataError: If the teacher gave no weights of a class.
    """

    recipe = Recipe(
        {"lr": 0.005, "batch_size": 8, "epochs": 20}, factors=(0.1, 1.0, 10.0), steps=100, trial_steps=30
    )

    reads_frozen = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        visual_length: Annotated[int, Field(ge=1, le=256)] = 4,
        visual_depth: Annotated[int, Field(ge=1)] = 9,
        weight: Annotated[float, Field(gt=0)] = 1000.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        teacher_width: Annotated[int | None, Field(ge=1)] = None,
        taught_classes: tuple[str, ...] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        vision = backbone.vision
        vision.require_prompts()
        self.weight = weight
        self.temperature = temperature
        self.seed = seed

        depth = possible_depth(visual_depth, vision.layers)
        self.visual = nn.Parameter(initial_visual_prompts(vision, depth, visual_length, "append", seed))
        self.projector = self._new_projector(teacher_width or backbone.dim)
        self._teachers: list[Learner] = []  # a list, so that no part of the teacher is a part of this

        if taught_classes is None:
            weights = backbone.class_weights(self.classnames, self.templates)
            self.register_buffer(_WEIGHTS, weights, persistent=False)
            self._places = list(range(len(self.classnames)))
        else:
            empty = torch.zeros(len(taught_classes), teacher_width or backbone.dim)  # comes with the state
            self.register_buffer(_WEIGHTS, empty)
            self._places = self._known_places(taught_classes)
        self.taught_classes = taught_classes

    # --- the teacher

    @property
    def teacher(self) -> Learner | None:
        """See :attr:`Learner.teacher`."""
        return self._teachers[0] if self._teachers else None

    def learn_from(self, teacher: Learner) -> None:
        """See :meth:`Learner.learn_from`: takes its class weights; what was learned before fits no other teacher.

        Raises:
            DataError: If its logits are no cosines with one weight per class.
        """
        if type(teacher).logits is not Learner.logits:
            raise DataError(
                f"{teacher.title()} can't teach {self.title()}: its logits are more than cosines with one weight per "
                "class. Use a learner of prompts (promptsrc, maple, coop ...)."
            )
        own = teacher.with_classes(self.classnames) if teacher.classnames != self.classnames else teacher
        own.eval()
        with torch.no_grad():
            weights = own.class_weights()

        width = weights.shape[1]
        if width != self.projector[-1].out_features:
            self.projector = self._new_projector(width).to(self.backbone.device)
        del self._buffers[_WEIGHTS]
        self.register_buffer(_WEIGHTS, weights.to(self.backbone.device))

        self._teachers = [own]
        self.taught_classes = self.classnames
        self._places = list(range(len(self.classnames)))
        self.options |= {"teacher_width": width, "taught_classes": list(self.classnames)}
        self._cached_weights = None

    # --- the classifier

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        return VisualPrompts(self.visual, "append")

    def embed_images(self, images: Images) -> Tensor:
        """Return (B, D) embeddings in the teacher's joint space."""
        return self.projector(super().embed_images(images))

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`: (C, D), the teacher's."""
        return self.get_buffer(_WEIGHTS)[self._places]

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``distillation``; labels are not read."""
        teacher = self.teacher
        with torch.no_grad():
            if teacher is None:
                frozen = batch.get("frozen")
                if frozen is None:
                    frozen = self.backbone.image_embeddings(batch["image"])
                scale = self.backbone.logit_scale
                target = scale * F.normalize(frozen, dim=-1) @ self.class_weights().T
            else:
                target = teacher.logits(batch["teacher"].to(teacher.device)).to(self.backbone.device)

        logits = self.logits(self.batch_embeddings(batch)) / self.temperature
        divergence = F.kl_div(
            logits.log_softmax(-1),
            (target / self.temperature).log_softmax(-1),
            reduction="none",
            log_target=True,
        )
        return {"distillation": self.weight * self.temperature**2 * divergence.mean()}

    # --- what is learned

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Trainable.trainable_state`: with what batch norm measured, and a teacher's class weights."""
        return {**super().trainable_state(), **self._kept()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`."""
        kept = self._kept()
        problems = misfits(self.trainable_state(), state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")

        super().load_trainable_state({name: tensor for name, tensor in state.items() if name not in kept})
        for name, tensor in kept.items():
            tensor.copy_(state[name])

    def with_classes(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """See :meth:`Learner.with_classes`; classes that the teacher gave no weights of need it, or are refused."""
        teacher = self.teacher
        if teacher is None:
            return super().with_classes(classnames, templates)

        options = {name: value for name, value in self.options.items() if name not in _OF_TEACHER}
        other = type(self)(self.backbone, classnames, templates or self.templates, **options)
        other.method = self.method
        other.to(self.backbone.device).learn_from(teacher)
        other.load_trainable_state({**self.trainable_state(), _WEIGHTS: other.get_buffer(_WEIGHTS)})
        return other.train(self.training)

    def _kept(self) -> dict[str, Tensor]:
        """Return the buffers that belong to what is learned."""
        kept = {f"projector.{name}": buffer for name, buffer in self.projector.named_buffers()}
        if self.taught_classes is not None:
            kept[_WEIGHTS] = self.get_buffer(_WEIGHTS)
        return kept

    def _known_places(self, taught: Sequence[str]) -> list[int]:
        """Return where each class stands among those the teacher gave weights of."""
        places = match_classes(self.classnames, taught)
        unknown = [name for name, place in zip(self.classnames, places, strict=True) if place is None]
        if unknown:
            raise DataError(
                f"promptkd has its teacher's weights of {len(taught)} classes, and none of {listed_names(unknown)}. "
                "Its file holds no teacher: give it that one again (learner.learn_from(teacher)), or train with all "
                "names."
            )
        return [place for place in places if place is not None]

    def _new_projector(self, width: int) -> nn.Sequential:
        with seeded_modules(self.seed, "promptkd projector"):
            return nn.Sequential(
                nn.Linear(self.backbone.dim, width), _BatchNorm(width), nn.ReLU(), nn.Linear(width, width)
            )


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes what it measured before where a batch is one image, such as the rest of an epoch."""

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, D) normalised rows."""
        if self.training and len(input) == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
            )
        return super().forward(input)
