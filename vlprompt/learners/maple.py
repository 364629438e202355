"""MaPLe: deep text prompts, and visual prompts that are linear images of them.

Paper: Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023, arXiv 2210.03117, section 3.2. Unlike the
authors' code, widths come from the backbone and everything learned is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import VisualPrompts
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners._unified import initial_deep_context, phrase_context
from vlprompt.learners._visual import PromptedImages, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["MaPLe"]


@LEARNERS.register(
    "maple",
    summary="deep text prompts, projected layer by layer into visual ones",
    paper="2210.03117",
    needs=("text", "vision"),
)
class MaPLe(OffsetSentences, PromptedImages):
    """M learned tokens in each of the first J text layers; a Linear per layer makes the image tower's from them.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: M, learned tokens per layer; with ``init`` the first M tokens of the phrase.
        depth: J, prompted layers of both towers, at most all the shallower one has (9 for base-to-new, 3 across
            data sets).
        init: The phrase before the class name; its tokens after the first M stay as written. Empty: random.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of all random starts.

    Raises:
        BackboneError: If prompts can't enter one of the backbone's towers.
        DataError: If the phrase has fewer than M tokens.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.0035, "batch_size": 4, "epochs": 5}, steps=100, trial_steps=30)

    deep_context: nn.Parameter | None
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 2,
        depth: Annotated[int, Field(ge=1)] = 9,
        init: str = "a photo of a",
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        text = backbone.text
        vision = backbone.vision
        text.require_prompts()
        vision.require_prompts()
        depth = possible_depth(depth, text.layers, vision.layers)

        words = Attributes(attributes, attribute_length)
        start, self.layout = phrase_context(text, self.classnames, context_length, init, seed, words)
        self._begin_offsets(offsets, seed)
        self.context = nn.Parameter(start)  # (M, Dt), then those of the attributes
        self.length = context_length
        deep = nn.Parameter(initial_deep_context(text, depth, context_length, seed))  # (J - 1, M, Dt)
        self.register_parameter("deep_context", deep if depth > 1 else None)

        self.projections = nn.ModuleList()
        for layer in range(depth):
            # All but the first start from one draw, as in the authors' code.
            with seeded_modules(seed, "projection", min(layer, 1)):
                self.projections.append(nn.Linear(text.width, vision.width))

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        deep = [] if self.deep_context is None else list(self.deep_context)
        prompts = [self.context[: self.length], *deep]
        tokens = [project(p) for project, p in zip(self.projections, prompts, strict=True)]
        return VisualPrompts(torch.stack(tokens), "append")

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context, self.deep_context)
