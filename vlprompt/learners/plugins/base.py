"""What every plug-in is: a learner around another one, which stays what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.trainable import Hooks, ParameterGroup, Phase, forward_all, misfits
from vlprompt.data.transforms import Preprocess
from vlprompt.learners.base import Learner, tell_of_head
from vlprompt.learners.hooks import LearnerHooks

__all__ = ["Plugin"]

_INNER = "inner."


class _Around(Learner):
    """A learner whose hooks are those of the learner inside."""

    inner: Learner

    @property
    def wrapped(self) -> Learner:
        """The learner inside."""
        return self.inner


forward_all(_Around, Hooks)
forward_all(_Around, LearnerHooks)


class Plugin(_Around):
    """Base of all plug-ins: does what the learner inside does, and learns what it learns.

    A plug-in overrides :meth:`loss`, :meth:`logits` or :meth:`class_embeddings`, adds parameters of its own, and may
    put a function into ``refiners``, which reads or changes the class embeddings inside. Keyword-only constructor
    arguments are its options. Learned tensors of the learner inside have ``inner.`` before their names.

    Args:
        inner: The learner inside; it belongs to the plug-in from here on.

    Raises:
        DataError: If it can't stand on that learner; says why.

    Attributes:
        plugin: Its registry name.
        rank: Plug-ins are put around in the order of their ranks.
        rate: Multiple of the learning rate that its own parameters have.
        new_options: The options it was built with; ``options`` has those of the learner inside, and these.
    """

    plugin: ClassVar[str] = ""
    rank: ClassVar[int] = 0
    rate: float = 1.0
    new_options: dict[str, Any]

    def __init__(self, inner: Learner) -> None:
        nn.Module.__init__(self)  # names and tokens were checked by the learner inside
        new_options = dict(self.options)  # what __new__ remembered
        earlier = inner.options.get("plugins", [])
        row = {"name": self.plugin, **new_options}

        self.inner = inner
        self.backbone = inner.backbone
        self.classnames = inner.classnames
        self.templates = inner.templates
        self.method = inner.method
        self.recipe = inner.recipe
        self.new_options = new_options
        self.options = {**inner.options, "plugins": [*earlier, row]}
        self.refiners = inner.refiners  # the innermost learner's, whatever is around it
        self._cached_weights = None

        self.static_images = inner.static_images
        self.reads = inner.reads
        self.reads_frozen = inner.reads_frozen
        self.pairs_views = inner.pairs_views
        self.class_bound = inner.class_bound
        self.learns_texts = inner.learns_texts
        self.smooth = inner.smooth

    def refuse(self, reason: str) -> None:
        """Say why the plug-in can't stand on the learner inside.

        Raises:
            DataError: Always.
        """
        raise DataError(f"the plug-in {self.plugin} can't stand on {self.inner.title()}: {reason}")

    def title(self) -> str:
        """See :meth:`Learner.title`."""
        return f"{self.inner.title()} with {self.plugin}"

    def layers(self) -> list[str]:
        """Return the names of all plug-ins, the innermost first."""
        below = self.inner.layers() if isinstance(self.inner, Plugin) else []
        return [*below, self.plugin]

    # --- the classifier

    @property
    def preprocess(self) -> Preprocess:
        """See :attr:`Learner.preprocess`."""
        return self.inner.preprocess

    @property
    def preparation(self) -> str:
        """See :attr:`Learner.preparation`."""
        return self.inner.preparation

    def embed_images(self, images: Tensor) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        return self.inner.embed_images(images)

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`."""
        return self.inner.frozen_stages()

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; the refiners have seen them."""
        return self.inner.refined(self.inner.class_embeddings())

    def refined(self, embeddings: Tensor) -> Tensor:
        """See :meth:`Learner.refined`: those of the learner inside are refined already."""
        return embeddings

    def logits(self, embeddings: Tensor) -> Tensor:
        """See :meth:`Learner.logits`."""
        return self.inner.logits(embeddings)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Learner.loss`."""
        return self.inner.loss(batch)

    # --- what is learned

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """Return the plug-in's own parameters by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith(_INNER)
        }

    def new_state(self) -> dict[str, Tensor]:
        """Return all tensors that the plug-in adds to the learned state."""
        return {name: parameter.detach() for name, parameter in self.new_parameters().items()}

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """See :meth:`Trainable.learned_parameters`: those inside first."""
        inside = {_INNER + name: p for name, p in self.inner.learned_parameters().items()}
        return {**inside, **self.new_parameters()}

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Trainable.trainable_state`."""
        inside = {_INNER + name: tensor for name, tensor in self.inner.trainable_state().items()}
        return {**inside, **self.new_state()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`."""
        problems = misfits(self.trainable_state(), state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")

        inside, rest = _parted(state)
        self.inner.load_trainable_state(inside)
        self.load_new_state(rest)
        self._cached_weights = None

    def load_new_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`new_state` returned."""
        for name, tensor in self.new_state().items():
            tensor.copy_(state[name])

    def with_classes(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Plugin:
        """See :meth:`Learner.with_classes`."""
        other = type(self)(self.inner.with_classes(classnames, templates), **self.new_options)
        other.to(self.backbone.device).load_trainable_state(self.trainable_state())
        if other.head_classes and other.classnames != self.classnames:
            tell_of_head(other)
        other.train(self.training)
        return other

    def keep_head(self, names: Sequence[str] | None) -> None:
        """See :meth:`Learner.keep_head`: the option is the plug-in's."""
        options = self.options
        super().keep_head(names)
        kept = options.pop("head_classes")
        self.new_options["head_classes"] = kept
        options["plugins"][-1]["head_classes"] = kept

    # --- hooks that speak of names

    def parameter_groups(self) -> list[ParameterGroup]:
        """See :meth:`Hooks.parameter_groups`: those inside, then the plug-in's own."""
        own = list(self.new_parameters())
        groups: list[ParameterGroup] = [
            {**group, "names": [_INNER + name for name in group["names"]]}
            for group in self.inner.parameter_groups()
        ]
        if not groups and (not own or self.rate == 1):
            return []
        if not groups:
            groups = [{"names": [_INNER + name for name in self.inner.learned_parameters()]}]
        return [*groups, {"names": own, "rate": self.rate}] if own else groups

    def phases(self) -> list[Phase]:
        """See :meth:`Hooks.phases`: those inside; what the plug-in adds learns in all of them."""
        own = tuple(self.new_parameters())
        phases = [
            Phase(tuple(_INNER + name for name in phase.names), phase.share) for phase in self.inner.phases()
        ]
        if own and phases:
            phases[-1] = Phase((*phases[-1].names, *own), phases[-1].share)  # no parameter is of two phases
        return phases

    def combine_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """See :meth:`Hooks.combine_gradients`: the learner inside combines its own losses, all others are added."""
        count = len(self.inner.learned_parameters())
        new = self.new_losses()
        inside = {name: list(parts)[:count] for name, parts in gradients.items() if name not in new}
        first = next(iter(gradients.values()))
        below = [torch.zeros_like(gradient) for gradient in list(first)[:count]]
        if inside:
            below = self.inner.combine_gradients(inside)

        added = [list(parts) for name, parts in gradients.items() if name in new]
        for parts in added:
            below = [one + other for one, other in zip(below, parts[:count], strict=True)]
        own = [
            sum(parts[1:], parts[0])
            for parts in zip(*(list(p)[count:] for p in gradients.values()), strict=True)
        ]
        return [*below, *own]

    def new_losses(self) -> frozenset[str]:
        """Return the names of the losses that the plug-in adds."""
        return frozenset()

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See :meth:`Hooks.transform_gradients`."""
        inside, rest = _parted(gradients)
        changed = self.inner.transform_gradients(inside)
        return {**{_INNER + name: gradient for name, gradient in changed.items()}, **rest}


def _parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the learner inside, under its own names, and the others."""
    inside = {name.removeprefix(_INNER): t for name, t in tensors.items() if name.startswith(_INNER)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(_INNER)}


def with_embeddings(learner: Learner, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch with the image embeddings, so that a plug-in and the learner inside share one pass."""
    return {**batch, "embedding": learner.batch_embeddings(batch)}
