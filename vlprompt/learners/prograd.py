"""ProGrad: learned context whose updates never go against zero-shot classification.

Paper: Zhu et al., "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, arXiv 2205.14865, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import DataError
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["ProGrad", "class_last", "project_conflict"]


@LEARNERS.register(
    "prograd",
    summary="learned context, updates projected to agree with zero-shot",
    paper="2205.14865",
    needs=("text", "teacher"),
)
class ProGrad(OffsetSentences):
    """Sentences [start | M context vectors | class name . end]; two losses, of which one only steers.

    ``kl`` compares the predictions with zero-shot ones (it differs from their Kullback-Leibler divergence by
    a constant). Where its gradient and that of ``cross_entropy`` disagree, the latter's component against the
    former is removed (:func:`project_conflict`); where they agree, cross entropy alone moves the context. The
    removal takes the trainer, which calls :meth:`combine_gradients`; adding the losses up is distillation.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; zero-shot classification uses all, the initialisation the first.
        context_length: M, number of context vectors.
        init: What the context starts from. ``"template"``: the first template, see :func:`class_last`. Empty:
            N(0, 0.02^2). Anything else is a phrase. Token embeddings of words stand right before the class
            name, the context vectors left of them start at zero.
        strength: How much of the disagreeing component is removed (the paper's lambda); 0 is CoOp.
        temperature: Divides both logits in ``kl``.
        teacher: Sentences of zero-shot classification. ``"templates"``: as they are. ``"class_last"``: in the order
            of :func:`class_last`, as the authors' own ("a type of pet, a photo of a beagle."); the two differ by up to
            nine logits on Oxford Pets.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        DataError: If the phrase has more tokens than there are context vectors.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32}, epochs_by_shots=((1, 50), (2, 100), (8, 200)))

    combines_gradients = True
    zero_shot: Tensor
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 16,
        init: str = "template",
        strength: Annotated[float, Field(ge=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        teacher: Literal["templates", "class_last"] = "templates",
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.strength = strength
        self.temperature = temperature

        if init == "template":
            start = _right_aligned(
                backbone.text, context_length, class_last(self.templates[0]), seed, cut=True
            )
        else:
            start = _right_aligned(backbone.text, context_length, init, seed)
        words = Attributes(attributes, attribute_length)
        self.context = nn.Parameter(words.joined(start, seed))  # (M, Dt), then those of the attributes
        self.layout = context_layout(backbone.text, self.classnames, context_length, attributes=words)
        self._begin_offsets(offsets, seed)

        sentences = self.templates
        if teacher == "class_last":
            sentences = tuple(f"{class_last(template)} {{}}.".strip() for template in self.templates)
        frozen = backbone.class_weights(self.classnames, sentences)  # (C, d)
        self.register_buffer("zero_shot", frozen, persistent=False)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy`` and ``kl`` = -T^2 sum_c p0_c log p_c, both means over the batch."""
        embeddings = self.batch_embeddings(batch)
        logits = self.logits(embeddings)

        with torch.no_grad():
            frozen = self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ self.zero_shot.T
            target = (frozen / self.temperature).softmax(-1)

        return {
            "cross_entropy": F.cross_entropy(logits, batch["label"]),
            "kl": self.temperature**2 * F.cross_entropy(logits / self.temperature, target),
        }

    def combine_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """See :meth:`Hooks.combine_gradients`."""
        pairs = zip(gradients["cross_entropy"], gradients["kl"], strict=True)
        return [project_conflict(task, general, self.strength) for task, general in pairs]


def project_conflict(task: Tensor, general: Tensor, strength: float = 1.0) -> Tensor:
    """Return ``task`` without ``strength`` times its component against ``general``.

    With u = general / |general|: task - strength * min(<task, u>, 0) * u. A zero
    gradient has no direction and changes nothing.
    """
    unit = general / general.norm().clamp(min=torch.finfo(general.dtype).tiny)
    return task - strength * (task * unit).sum().clamp(max=0) * unit


def class_last(template: str) -> str:
    """Return the words of a template in an order that ends where the class name stands.

    What follows the name moves to the front, as in the authors' own templates: ``"a photo of a {}, a type of
    pet."`` becomes ``"a type of pet, a photo of a"``.
    """
    before, _, after = template.partition("{}")
    words = [part.strip(" ,.;:") for part in (after, before)]
    return ", ".join(part for part in words if part)


def _right_aligned(tower: TextTower, length: int, phrase: str, seed: int, cut: bool = False) -> Tensor:
    """Return (length, Dt): zeros, then the phrase; or random values if there is no phrase.

    Args:
        tower: The text tower.
        length: M.
        phrase: Words, or nothing.
        seed: Of the random values.
        cut: Keep the last ``length`` tokens of a longer phrase instead of refusing it.

    Raises:
        DataError: If the phrase is longer and may not be cut.
    """
    words = initial_context(tower, length, phrase, seed)
    if len(words) > length and not cut:
        raise DataError(
            f"init={phrase!r} has {len(words)} tokens, context_length is {length}. Raise context_length or shorten it."
        )

    words = words[-length:]
    return F.pad(words, (0, 0, length - len(words), 0))
