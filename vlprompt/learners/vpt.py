"""VPT: learn tokens that the image tower reads beside the patches; the text side stays as written.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, section 3. The same mechanism is MVLPT's
visual family (Shen et al., arXiv 2211.11720) and the visual baseline of MaPLe (Khattak et al., CVPR 2023).

Towers that tokens can't enter (ResNet, ConvNeXt, Swin, FastViT) learn pixels instead: Bahng et al., "Exploring Visual
Prompts for Adapting Large-Scale Models", arXiv 2203.17274, section 3. The paper starts from N(0, 1); here pixels start
at 0, so that training starts as zero-shot classification.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.pixels import default_frame, frame_size, place_pixels
from vlprompt.backbones.vision import Insertion, PixelPrompts, Prompts, VisualPrompts
from vlprompt.core.errors import ConfigError
from vlprompt.learners import LEARNERS
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["VPT"]

log = logging.getLogger("vlprompt.learners")


@LEARNERS.register(
    "vpt",
    summary="learned tokens in the image tower, or learned pixels around the image",
    paper="2203.12119",
    needs=("vision",),
)
class VPT(PromptedImages):
    """M learned tokens in the first J layers of the image tower, or learned pixels; class weights are zero-shot.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class weights, once (one in the papers).
        visual_length: M, learned tokens per layer.
        visual_depth: J, prompted layers, at most all the tower has: None is all (deep), 1 is shallow.
        insertion: ``after_cls`` (VPT, MVLPT) or ``append`` (MaPLe's baseline); see :class:`VisualPrompts`.
        dropout: Share of prompt values that are dropped in training.
        where: What is learned: ``tokens``, ``pixels``, or ``auto``: tokens where they can enter, else pixels.
        frame: P, width in pixels of the learned frame (``pixels``); None is the paper's share of the image, 30 of 224;
            0 is none.
        patch: S, side in pixels of a learned patch in the upper left corner (``pixels``); 0 is none.
        seed: Of the random start of tokens.

    Raises:
        BackboneError: If tokens are asked for and the backbone's image tower is no sequence of tokens.
        ConfigError: If there are neither frame nor patch, or they don't fit the image.
    """

    recipe = Recipe({"lr": 0.0025, "batch_size": 4, "epochs": 5}, steps=100, trial_steps=30)

    visual: nn.Parameter | None
    frame: nn.Parameter | None
    patch: nn.Parameter | None

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        visual_length: Annotated[int, Field(ge=1, le=256)] = 16,
        visual_depth: Annotated[int | None, Field(ge=1)] = None,
        insertion: Insertion = "after_cls",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        where: Literal["auto", "tokens", "pixels"] = "auto",
        frame: Annotated[int | None, Field(ge=0)] = None,
        patch: Annotated[int, Field(ge=0)] = 0,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.insertion = insertion
        self.visual_dropout = dropout

        tower = backbone.vision
        if where == "auto" and tower.reason is not None:
            log.info("vpt learns pixels around the image: %s.", tower.reason)
            where = "pixels"

        tokens = None
        if where != "pixels":
            tower.require_prompts()
            depth = possible_depth(visual_depth, tower.layers)
            start = initial_visual_prompts(tower, depth, visual_length, insertion, seed)
            tokens = nn.Parameter(start)  # (J, M, W)
        self.register_parameter("visual", tokens)
        self._begin_pixels(frame, patch, where == "pixels")

        weights = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", weights, persistent=False)

    def visual_prompts(self) -> Prompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        if self.visual is not None:
            return VisualPrompts(self.visual, self.insertion)
        pixels = place_pixels(self.backbone.image_size, self.frame_width, self.frame, self.patch)
        return PixelPrompts(pixels)

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: pixels enter before everything."""
        return 0 if self.visual is None else super().frozen_stages()

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; constant."""
        return self.get_buffer("zero_shot")

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; the embeddings, which have unit length."""
        return self.get_buffer("zero_shot")

    def _begin_pixels(self, width: int | None, side: int, learned: bool) -> None:
        """Make the frame (3, K) and the patch (3, S, S), zeros; neither, unless pixels are what is learned."""
        size = self.backbone.image_size
        self.frame_width = default_frame(size) if width is None else width
        self.register_parameter("frame", None)
        self.register_parameter("patch", None)
        if not learned:
            return

        problems = []
        if not self.frame_width and not side:
            problems.append("frame: 0 and patch: 0 leave nothing to learn.")
        if 2 * self.frame_width >= min(size):
            problems.append(
                f"frame: {self.frame_width} covers the image of {size[1]} x {size[0]} pixels; at most "
                f"{(min(size) - 1) // 2}."
            )
        if side > min(size):
            problems.append(f"patch: {side} is larger than the image of {size[1]} x {size[0]} pixels.")
        if problems:
            raise ConfigError(problems, "learner 'vpt'")

        if self.frame_width:
            self.frame = nn.Parameter(torch.zeros(3, frame_size(size, self.frame_width)))
        if side:
            self.patch = nn.Parameter(torch.zeros(3, side, side))
