"""CoOp: learn the words around the class name.

Paper: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134, section 3.2.
The same mechanism is MVLPT's text family (Shen et al., arXiv 2211.11720), which puts the class name in the
middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower
from vlprompt.errors import DataError
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.seeding import torch_rng

__all__ = ["CoOp", "Position", "context_layout", "initial_context"]

Position = Literal["end", "middle", "front"]


@LEARNERS.register(
    "coop", summary="learned context words around the class name", paper="2109.01134", needs=("text",)
)
class CoOp(Learner):
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
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

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
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.class_bound = class_specific
        start = initial_context(backbone.text, context_length, init, seed)  # (M, Dt)
        count = len(start)
        copies = len(self.classnames) if class_specific else 1
        self.context = nn.Parameter(start.repeat(copies, 1))  # (M, Dt) or (C * M, Dt)
        self.layout = context_layout(backbone.text, self.classnames, count, position, class_specific)

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`."""
        return F.normalize(self.backbone.text.encode(self.layout, self.context), dim=-1)


def initial_context(tower: TextTower, length: int, init: str = "", seed: int = 1) -> Tensor:
    """Return (M, Dt) float32 start values of learned context.

    Args:
        tower: The text tower the context enters.
        length: M, if there is no phrase.
        init: A phrase whose token embeddings are taken; M becomes its number of tokens (not of words).
        seed: Of N(0, 0.02^2).

    Raises:
        DataError: If the phrase has no token.
    """
    tower.require_prompts()
    if not init:
        return 0.02 * torch.randn(length, tower.width, generator=torch_rng(seed, "context"))
    ids = tower.require_tokenizer().encode(init.replace("_", " "))
    if not ids:
        raise DataError(f"init={init!r} has no token to start the context from.")
    return tower.embed_tokens(ids).float().cpu().clone()


def context_layout(
    tower: TextTower,
    classnames: Sequence[str],
    count: int,
    position: Position = "end",
    class_specific: bool = False,
) -> PromptLayout:
    """Return the sentences of all classes with ``count`` context slots each.

    The full stop and the class name are tokenised together, as in a written sentence. In the middle the first
    ``count // 2`` vectors stand before the name.
    """
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    sentences = []
    for c, name in enumerate(classnames):
        slots = [slot(k + (c * count if class_specific else 0)) for k in range(count)]
        if before == count:
            pieces: list[str | int] = [*slots, f"{name}."]
        else:
            pieces = [*slots[:before], name, *slots[before:], "."]
        sentences.append(tower.sentence(*pieces))
    return tower.layout(sentences, classnames)
