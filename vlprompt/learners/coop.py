"""CoOp: learn the words around the class name.

Paper: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134, section 3.2.
The same mechanism is MVLPT's text family (Shen et al., arXiv 2211.11720), which puts the class name in the
middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, Position, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["CoOp"]


@LEARNERS.register(
    "coop", summary="learned context words around the class name", paper="2109.01134", needs=("text",)
)
class CoOp(OffsetSentences):
    """Sentences [start | context and class name | . end] with M learned context vectors.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: M, number of context vectors (the paper's n_ctx); ignored with ``init``.
        position: Where the class name stands: after the context (end), between its halves (middle), before it
            (front).
        class_specific: One context per class (the paper's CSC) instead of one for all.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2).
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32}, epochs_by_shots=((1, 50), (2, 100), (8, 200)))
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 16,
        position: Position = "end",
        class_specific: bool = False,
        init: str = "",
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.class_bound = class_specific

        copies = len(self.classnames) if class_specific else 1
        start = initial_context(backbone.text, context_length, init, seed, copies)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(
            words.joined(start, seed)
        )  # (M or C * M, Dt), then those of the attributes

        self.layout = context_layout(
            backbone.text,
            self.classnames,
            len(start) // copies,
            position,
            class_specific,
            attributes=words,
        )
        self._begin_offsets(offsets, seed)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context)
