"""IVLP: deep prompts in both towers that know nothing of each other; what PromptSRC regularises.

Paper: the baseline "independent vision-language prompting" of Khattak et al., CVPR 2023, arXiv 2210.03117 (appendix)
and ICCV 2023, arXiv 2307.06948, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners._offsets import OffsetOptions
from vlprompt.learners._unified import DualPrompts
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["IVLP"]


@LEARNERS.register(
    "ivlp", summary="deep, independent prompts in both towers", paper="2307.06948", needs=("text", "vision")
)
class IVLP(DualPrompts):
    """Deep prompts of both towers; the text tower's first ones start from a phrase, all others at random.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: Learned tokens per text layer; with ``init`` the first of the phrase.
        visual_length: Learned tokens per image layer.
        text_depth: Prompted text layers, at most all the tower has.
        visual_depth: Prompted image layers, at most all the tower has.
        init: The phrase before the class name; tokens after ``context_length`` stay as written. Empty: random.
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
