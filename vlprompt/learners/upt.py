"""UPT: text and visual prompts made from one set by a small transformer, so that the two learn together.

Paper: Zang et al., "Unified Vision and Language Prompt Learning", arXiv 2210.07225, section 3.2. The authors
published no trainer; forms and sizes follow MVLPT's unified family (Shen et al., arXiv 2211.11720).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Insertion, VisualPrompts
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, Position, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners._unified import Mixing, PromptMixer
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["UPT"]


@LEARNERS.register(
    "upt",
    summary="text and visual prompts mixed by a small transformer",
    paper="2210.07225",
    needs=("text", "vision"),
)
class UPT(OffsetSentences, PromptedImages):
    """Learned context and visual prompts pass through one :class:`PromptMixer` before they enter their towers.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: M of the text tower; ignored with ``init``.
        visual_length: M of the image tower.
        visual_depth: Prompted layers of the image tower, at most all it has; None is all.
        position: Where the class name stands, see :class:`CoOp`.
        class_specific: One context per class instead of one for all.
        init: A phrase that starts the context; without ``residual`` the mixer's random projections garble it.
        mixer: See :class:`PromptMixer`; ``identity`` gives independent prompts.
        mixer_width: The mixer's common width.
        residual: See :class:`PromptMixer`.
        insertion: See :class:`VisualPrompts`.
        dropout: Share of visual prompt values that are dropped in training.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of all random starts.

    Raises:
        BackboneError: If prompts can't enter one of the backbone's towers.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32, "epochs": 200}, steps=100, trial_steps=30)
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        visual_length: Annotated[int, Field(ge=1, le=256)] = 4,
        visual_depth: Annotated[int | None, Field(ge=1)] = None,
        position: Position = "middle",
        class_specific: bool = False,
        init: str = "",
        mixer: Mixing = "transformer",
        mixer_width: Annotated[int, Field(ge=1)] = 128,
        residual: bool = False,
        insertion: Insertion = "after_cls",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        text = backbone.text
        vision = backbone.vision
        vision.require_prompts()
        self.class_bound = class_specific
        self.insertion = insertion
        self.visual_dropout = dropout

        copies = len(self.classnames) if class_specific else 1
        start = initial_context(text, context_length, init, seed, copies)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(
            words.joined(start, seed)
        )  # (M or C * M, Dt), then those of the attributes
        self.layout = context_layout(
            text, self.classnames, len(start) // copies, position, class_specific, attributes=words
        )
        self._begin_offsets(offsets, seed)

        depth = possible_depth(visual_depth, vision.layers)
        self.visual = nn.Parameter(initial_visual_prompts(vision, depth, visual_length, insertion, seed))

        self.mixer = PromptMixer(
            text.width, vision.width, width=mixer_width, kind=mixer, residual=residual, seed=seed
        )

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Return the mixed (M or C * M, Dt) text and (J, M, W) visual prompts."""
        return self._once("mixed", lambda: self.mixer(self.context, self.visual))

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        return VisualPrompts(self.prompts()[1], self.insertion)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.prompts()[0])
