"""DePT, decomposed prompt tuning: a short context, and low-rank offsets of the frozen words for what it saves.

Paper: Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024, arXiv
2309.05173, section 2.2.

Written for T5; on CLIP it is CoOp (Zhou et al., IJCV 2022) with the option ``offset_rank`` that other learners of
context have, too, and no figure was published. The authors' code adds its offsets by place in the padded input, padding
included; here places are counted behind the start, learned vectors apart, and padding has none. Another method of the
same name, decoupled prompt tuning (Zhang et al., CVPR 2024), has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError
from vlprompt.core.options import whole_options
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Position
from vlprompt.learners._offsets import OffsetOptions, longest_tail
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.coop import CoOp
from vlprompt.learners.recipe import Recipe

__all__ = ["DePT"]


@LEARNERS.register(
    "dept",
    summary="decomposed prompt tuning: a short context and low-rank word offsets",
    paper="2309.05173",
    needs=("text",),
)
class DePT(CoOp):
    """CoOp with M context vectors and offsets that have as many numbers as the vectors it does without.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        context_length: M, number of context vectors; ignored with ``init``.
        budget: Context vectors whose numbers are filled: with ``offset_rank=0`` the rank is the largest that keeps M
            vectors and the offsets within ``budget`` times Dt numbers (11 for CLIP's ViT-B/16 and 20 places).
        position: Where the class name stands, see :class:`CoOp`.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2).
        seed: Of all random starts.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        ConfigError: If the budget leaves nothing for offsets.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32}, epochs_by_shots=((1, 50), (2, 100), (8, 200)))

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        budget: Annotated[int, Field(ge=1, le=1024)] = 16,
        position: Position = "end",
        init: str = "",
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        self.budget = budget
        super().__init__(
            backbone,
            classnames,
            templates,
            context_length=context_length,
            position=position,
            init=init,
            seed=seed,
            **offsets,
        )

    def _begin_offsets(self, options: OffsetOptions, seed: int) -> None:
        """Make the offsets, of the rank that fills the budget if none is given."""
        options = whole_options(OffsetOptions, options)
        rank = options["offset_rank"] or self._filling_rank(options)
        self.options["offset_rank"] = rank  # a twin for other classes has the same
        super()._begin_offsets({**options, "offset_rank": rank}, seed)

    def _filling_rank(self, options: OffsetOptions) -> int:
        """Return the largest rank whose offsets fit beside the context into the budget; options are whole."""
        text = self.backbone.text
        mode = options["offset_mode"]
        numbers = (self.budget - len(self.context)) * text.width

        over = options["offset_over"]
        places = options["offset_places"] or longest_tail(self.layout, text, self.classnames, over)
        if mode == "token":
            rank = (numbers - text.width) // (2 * text.width + 1)
        else:
            rows = places * (len(self.classnames) if mode == "class" else 1)
            rank = numbers // (rows + text.width)
        if rank < 1:
            raise ConfigError(
                [
                    f"budget: {self.budget} vectors of {text.width} numbers leave none for offsets beside "
                    f"{len(self.context)} context vectors (offset_mode={mode}). Raise it, or give offset_rank."
                ],
                "learner 'dept'",
            )
        return rank
