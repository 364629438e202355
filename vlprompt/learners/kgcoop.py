"""KgCoOp: learned context that stays close to what hand-written templates say.

Paper: Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", CVPR 2023,
    arXiv 2303.13283, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["KgCoOp"]


@LEARNERS.register(
    "kgcoop",
    summary="learned context held near the hand-written templates' features",
    paper="2303.13283",
    needs=("text", "teacher"),
)
class KgCoOp(OffsetSentences):
    """Sentences [start | M context vectors | class name . end]; cross entropy + weight * (1 - mean cosine).

    The cosine is between a class's learned weight and its zero-shot weight, averaged over classes. For unit
    vectors that is half the mean squared distance, the paper's form.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; their averaged features are what the context stays close to.
        context_length: M, number of context vectors; ignored with ``init``.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2).
        weight: Of the regulariser (the paper's lambda); 0 is CoOp.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 128, "epochs": 100})

    zero_shot: Tensor
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "a photo of a",
        weight: Annotated[float, Field(ge=0)] = 8.0,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.weight = weight

        start = initial_context(backbone.text, context_length, init, seed)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(words.joined(start, seed))  # (M, Dt), then those of the attributes
        self.layout = context_layout(backbone.text, self.classnames, len(start), attributes=words)
        self._begin_offsets(offsets, seed)

        frozen = backbone.class_weights(self.classnames, self.templates)  # (C, d)
        self.register_buffer("zero_shot", frozen, persistent=False)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy`` and ``knowledge``, the weighted regulariser."""
        embeddings = self.batch_embeddings(batch)
        weights = self.class_weights()  # one text pass serves both losses
        logits = self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ weights.T

        distance = 1 - (weights * self.zero_shot).sum(-1).mean()
        return {
            "cross_entropy": F.cross_entropy(logits, batch["label"]),
            "knowledge": self.weight * distance,
        }
