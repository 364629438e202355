"""VPT: learn tokens that the image tower reads beside the patches; the text side stays as written.

Paper: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119, section 3. The same mechanism is MVLPT's
visual family (Shen et al., arXiv 2211.11720) and the visual baseline of MaPLe (Khattak et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Insertion, VisualPrompts
from vlprompt.learners import LEARNERS
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES

__all__ = ["VPT"]


@LEARNERS.register(
    "vpt", summary="learned tokens in the image tower, shallow or deep", paper="2203.12119", needs=("vision",)
)
class VPT(PromptedImages):
    """M learned tokens in the first J layers of the image tower; class weights are the zero-shot ones.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class weights, once (one in the papers).
        visual_length: M, learned tokens per layer.
        visual_depth: J, prompted layers, at most all the tower has: None is all (deep), 1 is shallow.
        insertion: ``after_cls`` (VPT, MVLPT) or ``append`` (MaPLe's baseline); see :class:`VisualPrompts`.
        dropout: Share of prompt values that are dropped in training.
        seed: Of the random start.

    Raises:
        BackboneError: If the backbone's image tower is no sequence of tokens.
    """

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
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        backbone.vision.require_prompts()
        self.insertion = insertion
        self.visual_dropout = dropout

        depth = possible_depth(visual_depth, backbone.vision.layers)
        start = initial_visual_prompts(backbone.vision, depth, visual_length, insertion, seed)
        self.visual = nn.Parameter(start)  # (J, M, W)

        weights = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", weights, persistent=False)

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        return VisualPrompts(self.visual, self.insertion)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; constant."""
        return self.get_buffer("zero_shot")

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; the embeddings, which have unit length."""
        return self.get_buffer("zero_shot")
