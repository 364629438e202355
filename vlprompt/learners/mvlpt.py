"""MVLPT: prompts that are first learned on many tasks together, then on one.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 3. Here is what is learned:
the prompts of one of three families (CoOp's, VPT's, UPT's) with the paper's sizes. Several tasks are trained
together by :mod:`vlprompt.classification.multitask`, and a task starts from their prompts by ``target.init_from``; both
take any learner with shared prompts. Differs from the authors' code in the mixer, whose prompts see each other
(``mixer="tokenwise"`` is the code's swapped axes), and in that constant class weights are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Unpack

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import Images, VisualPrompts
from vlprompt.learners import LEARNERS
from vlprompt.learners._context import Attributes, Position, context_layout, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners._unified import Mixing, PromptMixer
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["MVLPT"]

Family = Literal["coop", "vpt", "upt"]
_LENGTHS: dict[str, tuple[int, int]] = {"coop": (16, 0), "vpt": (0, 16), "upt": (4, 4)}  # text, visual


@LEARNERS.register(
    "mvlpt",
    summary="multitask prompts: CoOp's, VPT's or UPT's, shared by tasks",
    paper="2211.11720",
    needs=("text", "vision"),
)
class MVLPT(OffsetSentences, PromptedImages):
    """Prompts of one family, the same for every class, so that tasks with different classes can share them.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; sentences of the class weights in the family ``vpt``, not used elsewhere.
        family: Which prompts are learned: ``coop`` (words), ``vpt`` (tokens in the image tower) or ``upt`` (both,
            mixed). Options of the others are ignored.
        context_length: M of the text tower; None is the paper's (16, in ``upt`` 4).
        visual_length: M of the image tower; None is the paper's (16, in ``upt`` 4).
        visual_depth: Prompted layers of the image tower, at most all it has; None is all, as in the paper.
        position: Where the class name stands, see :class:`CoOp`.
        init: A phrase that starts the context, see :func:`initial_context`.
        mixer: See :class:`PromptMixer`.
        mixer_width: The mixer's common width.
        residual: See :class:`PromptMixer`.
        dropout: Share of visual prompt values that are dropped in training.
        attributes: Attribute words that stand in front of the sentence, see :class:`Attributes`; empty: none.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: Low-rank offsets of the frozen words, see :class:`OffsetOptions`.
        seed: Of all random starts.

    Raises:
        BackboneError: If the family's prompts can't enter one of the backbone's towers.
        VLPromptError: If a class name is too long for the tower beside the context; names it.
    """

    recipe = Recipe({"lr": 0.002, "batch_size": 32, "epochs": 200}, steps=100, trial_steps=30)

    context: nn.Parameter | None
    visual: nn.Parameter | None

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        family: Family = "upt",
        context_length: Annotated[int | None, Field(ge=1, le=64)] = None,
        visual_length: Annotated[int | None, Field(ge=1, le=256)] = None,
        visual_depth: Annotated[int | None, Field(ge=1)] = None,
        position: Position = "middle",
        init: str = "",
        mixer: Mixing = "transformer",
        mixer_width: Annotated[int, Field(ge=1)] = 128,
        residual: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        attributes: Sequence[str] = (),
        attribute_length: Annotated[int, Field(ge=1, le=64)] = 2,
        seed: int = 1,
        **offsets: Unpack[OffsetOptions],
    ) -> None:
        super().__init__(backbone, classnames, templates)
        text = backbone.text
        vision = backbone.vision
        words, tokens = _LENGTHS[family]
        self.visual_dropout = dropout
        self.static_images = family == "coop"
        self.learns_texts = family != "vpt"

        context = None
        if family != "vpt":
            start = initial_context(text, context_length or words, init, seed)
            anchors = Attributes(attributes, attribute_length)
            context = nn.Parameter(anchors.joined(start, seed))  # (M, Dt), then those of the attributes
            self.layout = context_layout(text, self.classnames, len(start), position, attributes=anchors)
            self._begin_offsets(offsets, seed)
        else:
            self._refuse_offsets(offsets, "the family vpt learns nothing in its sentences.")
            weights = backbone.class_weights(self.classnames, self.templates)
            self.register_buffer("zero_shot", weights, persistent=False)

        visual = None
        if family != "coop":
            vision.require_prompts()
            depth = possible_depth(visual_depth, vision.layers)
            length = visual_length or tokens
            visual = nn.Parameter(initial_visual_prompts(vision, depth, length, seed=seed))  # (J, M, W)
        self.register_parameter("context", context)
        self.register_parameter("visual", visual)

        self.mixer = None
        if family == "upt":
            self.mixer = PromptMixer(
                text.width, vision.width, width=mixer_width, kind=mixer, residual=residual, seed=seed
            )

    def prompts(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the (M, Dt) text and (J, M, W) visual prompts as they enter the towers; None where there are none."""
        mixer = self.mixer
        context = self.context
        visual = self.visual
        if mixer is None or context is None or visual is None:
            return context, visual
        return self._once("mixed", lambda: mixer(context, visual))

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        return VisualPrompts(self.prompts()[1])  # type: ignore[arg-type]  # asked for only where there are some

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        if self.visual is None:
            return self.backbone.image_embeddings(images)
        return super().embed_images(images)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; constant in the family ``vpt``."""
        context = self.prompts()[0]
        return self.get_buffer("zero_shot") if context is None else self._encode(context)
