"""Zero-shot classification with an ensemble of hand-written templates: the baseline of every comparison.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv
    2103.00020, 3.1.4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner

__all__ = ["ZeroShot"]


@LEARNERS.register(
    "zero_shot", summary="hand-written templates, averaged; nothing is learned", paper="2103.00020"
)
class ZeroShot(Learner):
    """Class weights are the normalised mean of the normalised features of all templates.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences with one ``{}``; their features are averaged per class.
    """

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.register_buffer(
            "weights", backbone.class_weights(self.classnames, self.templates), persistent=False
        )

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; the unit-length class weights."""
        return self.get_buffer("weights")

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; the embeddings, which have unit length."""
        return self.get_buffer("weights")
