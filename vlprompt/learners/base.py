"""What every learner is: parameters, how they become a classifier, and a loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import TokenStates
from vlprompt.core.errors import DataError, VLPromptError
from vlprompt.core.names import check_classnames, check_templates, listed_names, match_classes
from vlprompt.core.precision import Precision
from vlprompt.core.trainable import Trainable
from vlprompt.data.transforms import Preprocess
from vlprompt.learners._losses import binary_cross_entropy
from vlprompt.learners.hooks import LearnerHooks
from vlprompt.learners.recipe import Recipe

__all__ = ["DEFAULT_TEMPLATES", "Learner", "tell_of_head"]

log = logging.getLogger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Learner(nn.Module, LearnerHooks, Trainable):
    """Base of all methods: a classifier tau * cosine(image feature, class weight) with something to learn in it.

    A method overrides :meth:`class_embeddings` (the text side), or :meth:`embed_images` (prompted images), or
    :meth:`logits` (a different head); everything else follows. Optional behaviour during training is a hook, see
    :class:`LearnerHooks`. Keyword-only constructor arguments are the method's options.

    Args:
        backbone: Frozen towers; never trained, never copied.
        classnames: C names.
        templates: Hand-written sentences with one ``{}``.

    Attributes:
        static_images: True if nothing learned touches the image tower, so image embeddings may be cached.
        reads: What :meth:`embed_images` returns beside the image embedding, for caches; empty if nothing.
        reads_frozen: True if the loss reads the frozen tower's embedding of each image; ``batch["frozen"]`` holds it
            where the same pixels come again, so that it is computed once.
        pairs_views: True if that embedding is to be of another view of the image: of the next one, where views are
            random. Where the pixels don't come again, ``batch["second"]`` holds those of the next view.
        class_bound: True if the learned parameters belong to the class list, so that the learner can't move to
            other classes.
        head_classes: The classes that the learner has a head for, beside prompts that name any class; empty: there is
            no head of this kind, or it belongs to no class list.
        head_rule: ``"all"``: the head is used where it knows every class; ``"each"``: for the classes it knows.
        head_bound: True if the head is one set of parameters per class, so that tasks can't share it.
        learns_texts: True if each class is named by one vector that a text tower with something learned in it makes,
            and the losses read it through :meth:`class_weights` or :meth:`refined`: what plug-ins stand on.
        smooth: False if losses are a step function of the parameters (binary masks), so that a small step changes
            nothing.
        method: Its registry name.
        recipe: How it is trained where nobody says how.
        options: The options it was built with.
        refiners: What changes, or only reads, the class embeddings before they are made unit-length: functions of
            (C, d) that plug-ins put here.
    """

    divides_classes = True

    static_images: bool = True
    reads: str = ""
    reads_frozen: bool = False
    pairs_views: bool = False
    class_bound: bool = False
    head_classes: tuple[str, ...] = ()
    head_rule: ClassVar[Literal["all", "each"]] = "all"
    head_bound: ClassVar[bool] = False
    learns_texts: bool = False
    smooth: bool = True
    method: str = ""
    recipe: Recipe = Recipe()

    options: dict[str, Any]
    refiners: list[Callable[[Tensor], Tensor]]

    def __new__(cls, *_: Any, **keywords: Any) -> Learner:
        """Remember the options, so that the same learner can be built again for other classes or from a file."""
        self = super().__new__(cls)

        shared = ("backbone", "classnames", "templates")
        options = {name: value for name, value in keywords.items() if name not in shared}
        object.__setattr__(self, "options", options)  # nn.Module's own __setattr__ works only after __init__

        return self

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classnames = _check_classes(classnames)
        self.templates = check_templates(templates)
        _check_tokens(backbone, self.classnames, self.templates)
        self.refiners = []
        self._cached_weights: Tensor | None = None

    # --- the classifier

    @property
    def preprocess(self) -> Preprocess:
        """What makes (3, H, W) of an image of any size, as :meth:`forward` reads it; the backbone's by default."""
        return self.backbone.preprocess

    @property
    def preparation(self) -> str:
        """What :attr:`preprocess` does before the backbone's preparation, for caches; empty if nothing."""
        return ""

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 3, H, W) preprocessed images."""
        return self.logits(self.embed_images(images))

    @property
    def precision(self) -> Precision:
        """What the frozen towers compute in."""
        return self.backbone.precision

    @property
    def device(self) -> torch.device:
        """Where the backbone runs, and images are wanted."""
        return self.backbone.device

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, d) image embeddings, not normalised, of (B, 3, H, W) preprocessed images."""
        return self.backbone.image_embeddings(images)

    def frozen_stages(self) -> int:
        """Return how many stages of the image tower run before the first that something learned touches.

        Stage 0 is the stem (patches, class token, positions), stage 1 + i is block i. What these stages make of a fixed
        view never changes, so it is computed once and kept; then ``batch["image"]`` holds
        :class:`vlprompt.backbones.vision.TokenStates` in place of pixels, which :meth:`embed_images` gets.
        0, for a learner that does not say, means pixels, always. Not asked for where ``static_images`` is true; may
        change in :meth:`survey`.
        """
        return 0

    def frozen_states(self, images: Tensor) -> TokenStates:
        """Return what is kept of (B, 3, H, W) images: the tokens after :meth:`frozen_stages`, without a graph."""
        return self.backbone.image_states(images, self.frozen_stages() - 1)

    def class_embeddings(self) -> Tensor:
        """Return (C, d) embeddings of the classes, not normalised: what the text side says.

        Raises:
            VLPromptError: If the method has none, because its head is no set of one vector per class.
        """
        raise VLPromptError(f"{self.title()} has no class embeddings: its head is not one vector per class.")

    def class_weights(self) -> Tensor:
        """Return (C, d) unit-length class weights; called once per step, and once per evaluation."""
        return F.normalize(self.refined(self.class_embeddings()), dim=-1)

    def refined(self, embeddings: Tensor) -> Tensor:
        """Return (C, d) class embeddings after all refiners; as they are where there are none."""
        for refine in self.refiners:
            embeddings = refine(embeddings)
        return embeddings

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits tau * <f, w> of (B, d) image embeddings, normalised here."""
        return self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ self._weights().T

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named losses of a batch with ``"label"`` (B,) and either ``"image"`` or cached ``"embedding"``.

        Where images have several labels, ``"target"`` (B, C) holds them all, and the loss is binary cross entropy.
        """
        return self.classification_loss(self.batch_logits(batch), batch)

    def classification_loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy`` of (B, C) logits, or ``binary_cross_entropy`` where the batch has several labels."""
        if "target" not in batch:
            return {"cross_entropy": F.cross_entropy(logits, batch["label"])}
        return {"binary_cross_entropy": binary_cross_entropy(self.label_logits(logits), batch["target"])}

    def batch_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (B, C) logits of a batch of pixels or of cached image embeddings."""
        return self.logits(self.batch_embeddings(batch))

    def batch_embeddings(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what :meth:`embed_images` makes of a batch, or what the batch has of it already."""
        return batch["embedding"] if "embedding" in batch else self.embed_images(batch["image"])

    # --- a teacher

    @property
    def teacher(self) -> Learner | None:
        """A frozen learner, perhaps on another backbone, whose embedding of each training image the loss reads.

        ``batch["teacher"]`` holds them, as its own :meth:`embed_images` gives them. None: there is none.
        """
        return None

    def learn_from(self, teacher: Learner) -> None:
        """Take a teacher.

        Args:
            teacher: Frozen from here on; it is asked for this learner's classes.

        Raises:
            DataError: If nothing here learns from one, or not from this one.
        """
        raise DataError(f"{self.title()} learns from labels, not from a teacher. Use promptkd.")

    # --- images with several labels

    @property
    def takes_several_labels(self) -> bool:
        """Whether the loss reads all labels of an image, ``batch["target"]``; else it sees one sample for each label.

        True where a method has no loss of its own. One that reads them in its own loss, or in ``solve``, says so.
        """
        return type(self).loss is Learner.loss and not self.prepares and not self.solves

    def label_logits(self, logits: Tensor) -> Tensor:
        """Return (B, C) logits of which each alone tells by its sigmoid how likely a class is there.

        Logits tau * cosine compete and are all positive. Here those of an image are counted from their mean, which
        takes no part in the gradient; a learner with a bias of its own returns them as they are.

        Args:
            logits: (B, C), of :meth:`logits`.
        """
        return logits - logits.detach().mean(1, keepdim=True)

    # --- incremental learning

    def extend(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """Return what learns the next classes, after these: a learner of the next classes alone, ready to be trained.

        Its :meth:`with_classes` then names the classes of all sessions. Here: the same parameters, which go on
        learning, for other classes.

        Args:
            classnames: The classes of the next session.
            templates: Their hand-written sentences; None keeps those of this learner.

        Raises:
            DataError: If the learned parameters belong to the class list.
        """
        return self.with_classes(classnames, templates)

    # --- a head that belongs to some classes

    def keep_head(self, names: Sequence[str] | None) -> None:
        """Fix the classes of the head: the learner's own, or those it was trained on before it came to others.

        Called once, by the constructor of a learner with a head. They become the option ``head_classes``, so that a
        file and a twin for other classes know them.
        """
        self.head_classes = self.classnames if names is None else _check_classes(names)
        self.options["head_classes"] = list(self.head_classes)

    @property
    def head_places(self) -> list[int | None]:
        """For each class, its place among the classes of the head; None where the head is not used."""
        places = match_classes(self.classnames, self.head_classes)
        is_used = self.head_rule == "each" or None not in places
        return places if is_used else [None] * len(places)

    # --- other classes, and what is learned

    def with_classes(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """Return a learner with the same learned parameters for other classes (base-to-new, cross-dataset).

        A learner with a head for some classes says which of the new ones it names (:attr:`head_places`, and a line in
        the log).

        Args:
            classnames: The other classes.
            templates: Their hand-written sentences; None keeps those of this learner.

        Raises:
            DataError: If the learned parameters belong to the old class list.
        """
        if self.class_bound and _check_classes(classnames) != self.classnames:
            raise DataError(
                f"{self.title()} learned one set of parameters per class, so it can't name other "
                f"classes than its own {len(self.classnames)}. Use a learner with shared context (coop with "
                "class_specific=false)."
            )

        other = type(self)(self.backbone, classnames, templates or self.templates, **self.options)
        other.method = self.method
        other.to(self.backbone.device).load_trainable_state(self.trainable_state())
        if other.head_classes and other.classnames != self.classnames:
            tell_of_head(other)
        return other.train(self.training)

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`."""
        super().load_trainable_state(state)
        self._cached_weights = None

    def title(self) -> str:
        """Return its registry name, or that of its class if it was not built by name."""
        return self.method or type(self).__name__

    def train(self, mode: bool = True) -> Learner:
        """Switch the learner's own modules; the backbone stays in evaluation mode."""
        self._cached_weights = None
        return super().train(mode)

    def _weights(self) -> Tensor:
        """Return class weights; in evaluation without gradients they are computed once."""
        if self.training or torch.is_grad_enabled():
            return self.class_weights()

        if self._cached_weights is None:
            if torch.compiler.is_compiling():  # what a traced graph computes belongs to the graph
                return self.class_weights()
            self._cached_weights = self.class_weights()
        return self._cached_weights


def tell_of_head(learner: Learner) -> None:
    """Say which classes a learner's head names."""
    places = learner.head_places
    others = [name for name, place in zip(learner.classnames, places, strict=True) if place is None]
    log.info(
        "%s: the head names %d of %d classes%s",
        learner.title(),
        len(places) - len(others),
        len(places),
        f"; without it: {listed_names(others)}" if others else "",
    )


def _check_classes(classnames: Sequence[str]) -> tuple[str, ...]:
    """Return normalised class names; a classifier needs at least two."""
    names = check_classnames(classnames, "the learner")
    if len(names) < 2:
        raise DataError(
            f"a classifier needs at least two classes, got {len(names)}: {', '.join(names) or 'none'}."
        )
    return names


@cache
def warn_of_words_alike(backbone: str, first: str, second: str) -> None:
    """Say, once in a process, that a backbone's words for two classes mean the same to it."""
    log.warning(
        "%s reads %r and %r alike, so the text alone can't tell these classes apart; training images can.",
        backbone,
        first,
        second,
    )


def _check_tokens(backbone: Backbone, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Refuse classes whose sentences a text tower can't tell apart: equal tokens, or equal up to where it cuts.

    Raises:
        DataError: Names the two classes.
    """
    tokenizer = backbone.text.tokenizer
    if tokenizer is None:
        return

    room = backbone.text.context_length - len(tokenizer.start) - len(tokenizer.end)
    first_with: dict[tuple[object, ...], str] = {}
    for name in classnames:
        tokens = tokenizer.encode(name)
        if not tokens:
            raise DataError(
                f"the learner: the tokenizer reads nothing in the class name {name!r}. Give it another one."
            )

        key: tuple[object, ...] = tuple(tokens)
        if len(tokens) > room // 2:  # with the words of a template it may be cut
            key = tuple(tuple(tokenizer.encode(template.format(name))[:room]) for template in templates)

        other = first_with.setdefault(key, name)
        if other is not name and backbone.lexicon is not None and backbone.lexicon.differ(name, other):
            warn_of_words_alike(backbone.name, other, name)
        elif other is not name:
            raise DataError(
                f"the learner: the classes {other!r} and {name!r} are the same to the text tower, which reads "
                f"{backbone.text.context_length} tokens and neither capitals nor most signs. Rename one."
            )
