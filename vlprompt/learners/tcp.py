"""TCP: tokens made of a class's own frozen embedding take the learned context's place deep in the text tower.

Paper: Yao et al., "TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model", CVPR 2024, arXiv
    2311.18231, section 3. In the authors' code the weight that would mix class-aware tokens with what they replace is
    read nowhere; here there is none.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, context_layout
from vlprompt.learners._offsets import OffsetOptions
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.kgcoop import KgCoOp
from vlprompt.learners.recipe import Recipe

__all__ = ["TCP"]

log = logging.getLogger("vlprompt.learners")


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of CLIP's own towers."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to every value."""
        return x * (1.702 * x).sigmoid()


@LEARNERS.register(
    "tcp",
    summary="tokens made of each class's frozen embedding enter deep in the text tower",
    paper="2311.18231",
    needs=("text", "teacher"),
)
class TCP(KgCoOp):
    """KgCoOp whose M context vectors are replaced, before one deep block, by M tokens of the class's own.

    The tokens of class c are a function of w0_c, its zero-shot weight: linear, QuickGELU, linear, d -> d / reduction ->
    M * Dt. New classes therefore have tokens too. The losses are those of :class:`KgCoOp`.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; their averaged features are w0, and what the classes stay close to.
        context_length: M, number of context vectors and of class-aware tokens; ignored with ``init``.
        init: A phrase whose token embeddings start the context (M becomes its number of tokens); empty: N(0,
            0.02^2), as in the authors' configuration.
        weight: Of the regulariser.
        block: Number of the block, counted from 0, before which the context is replaced; None: two thirds of the way
            up (8 of 12).
        reduction: How many times narrower the network's hidden layer is than the joint space.
        suffix_from_template: Whether the words after the class name are those of the first template ("a type of pet")
            instead of a full stop alone, as in the authors' code for some data sets.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of the random initialisation.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        VLPromptError: If a class name is too long for the tower beside the context, or the tower has no such block;
            names it.
    """

    # An epsilon as large as the authors' matters: it holds back the steps of parameters with small gradients.
    recipe = Recipe({"lr": 0.002, "batch_size": 32, "epochs": 50, "optimizer": "adam", "eps": 1e-3})

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        context_length: Annotated[int, Field(ge=1, le=64)] = 4,
        init: str = "",
        weight: Annotated[float, Field(ge=0)] = 8.0,
        block: Annotated[int | None, Field(ge=1)] = None,
        reduction: Annotated[int, Field(ge=1)] = 4,
        suffix_from_template: bool = False,
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
            init=init,
            weight=weight,
            attributes=attributes,
            attribute_length=attribute_length,
            seed=seed,
            **offsets,
        )
        text = backbone.text
        self.block = _deep_block(block, text.layers)

        # Every class has places of its own, since what enters them above the block differs between classes.
        suffix = _suffix(self.templates[0]) if suffix_from_template else "."
        words = Attributes(attributes, attribute_length)
        self.length = len(self.context) - words.length * len(words.words)
        self.layout = context_layout(
            text, self.classnames, self.length, class_specific=True, suffix=suffix, attributes=words
        )
        self._begin_offsets(offsets, seed)

        hidden = max(1, backbone.dim // reduction)
        with seeded_modules(seed, "class tokens"):
            self.class_net = nn.Sequential(
                OrderedDict(
                    linear1=nn.Linear(backbone.dim, hidden),
                    gelu=QuickGELU(),
                    linear2=nn.Linear(hidden, self.length * text.width),
                )
            )

    def class_tokens(self) -> Tensor:
        """Return (C, M, Dt) tokens made of the zero-shot weights."""
        return self.class_net(self.zero_shot).view(len(self.classnames), self.length, -1)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        own = self.context[: self.length].repeat(len(self.classnames), 1)  # (C * M, Dt)
        context = torch.cat([own, self.context[self.length :]])
        tokens = self.class_tokens().flatten(0, 1)
        return self._encode(context, {self.block: tokens})


def _deep_block(asked: int | None, layers: int) -> int:
    """Return the block before which class-aware tokens enter."""
    if asked is None:
        return min(layers - 1, max(1, round(layers * 2 / 3)))
    if asked >= layers:
        raise VLPromptError(
            f"block={asked}: the text tower has {layers} blocks, so class-aware tokens enter before one of 1 to "
            f"{layers - 1}."
        )
    return asked


def _suffix(template: str) -> str:
    """Return the words of a template after the class name."""
    suffix = template.partition("{}")[2]
    log.info("tcp: learned sentences end in %r, as the template %r does.", suffix, template)
    return suffix
