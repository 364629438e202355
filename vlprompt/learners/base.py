"""What every learner is: parameters, how they become a classifier, and a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.names import check_classnames, check_templates

__all__ = ["DEFAULT_TEMPLATES", "Learner", "misfits"]

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Learner(nn.Module):
    """Base of all methods: a classifier tau * cosine(image feature, class weight) with something to learn in it.

    A method overrides :meth:`class_weights` (what the text side says), or :meth:`embed_images` (prompted
    images), or :meth:`logits` (a head of its own); everything else follows. Keyword-only constructor
    arguments are its options.

    Args:
        backbone: Frozen towers; never trained, never copied.
        classnames: C names.
        templates: Hand-written sentences with one ``{}``.

    Attributes:
        static_images: True if nothing learned touches the image tower, so image embeddings may be cached.
        reads: What :meth:`embed_images` gives beside the image embedding, for caches; empty if nothing.
        class_bound: True if what is learned belongs to the class list, so other classes can't be named.
        smooth: False if losses are a step function of what is learned (binary masks), so a small step shows nothing.
        method: Its registry name.
        options: The options it was built with.
    """

    static_images: bool = True
    reads: str = ""
    class_bound: bool = False
    smooth: bool = True
    method: str = ""

    options: dict[str, Any]

    def __new__(cls, *_: Any, **keywords: Any) -> Learner:
        """Remember the options, so that the same learner can be built again for other classes or from a file."""
        self = super().__new__(cls)
        shared = ("backbone", "classnames", "templates")
        object.__setattr__(self, "options", {k: v for k, v in keywords.items() if k not in shared})
        return self

    def __init__(
        self, backbone: Backbone, classnames: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classnames = _check_classes(classnames)
        self.templates = check_templates(templates)
        self._cached_weights: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, C) logits of (B, 3, H, W) preprocessed images."""
        return self.logits(self.embed_images(images))

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, d) image embeddings, not normalised."""
        return self.backbone.image_embeddings(images)

    def class_weights(self) -> Tensor:
        """Return (C, d) unit-length class weights; called once per step, and once per evaluation."""
        raise NotImplementedError

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits tau * <f, w> of (B, d) image embeddings, normalised here."""
        return self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ self._weights().T

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return named losses of a batch with ``"label"`` and either ``"image"`` or cached ``"embedding"``."""
        return {"cross_entropy": F.cross_entropy(self.batch_logits(batch), batch["label"])}

    def batch_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (B, C) logits of a batch of pixels or of cached image embeddings."""
        return self.logits(batch["embedding"]) if "embedding" in batch else self(batch["image"])

    def with_classes(self, classnames: Sequence[str], templates: Sequence[str] | None = None) -> Learner:
        """Return a learner with the same learned parameters for other classes (base-to-new, cross-dataset).

        Raises:
            DataError: If what was learned belongs to the old class list.
        """
        if self.class_bound and _check_classes(classnames) != self.classnames:
            raise DataError(
                f"{self.method or type(self).__name__} learned one set of parameters per class, so it can't name other "
                f"classes than its own {len(self.classnames)}. Use a learner with shared context (coop with "
                "class_specific=false)."
            )
        other = type(self)(self.backbone, classnames, templates or self.templates, **self.options)
        other.method = self.method
        other.to(self.backbone.device).load_trainable_state(self.trainable_state())
        return other.train(self.training)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what is learned, by name, and nothing else."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put learned tensors back.

        Raises:
            CheckpointError: If a tensor is missing, unknown or of another shape; each is named.
        """
        own = {n: p for n, p in self.named_parameters() if p.requires_grad}
        problems = misfits(own, state)
        if problems:
            raise CheckpointError(
                f"this state does not fit {self.method or type(self).__name__}: {'; '.join(problems)}."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self._cached_weights = None

    # Optional hooks of the trainer; a method defines those it needs:
    #   combine_gradients(gradients: dict[loss name, list of (parameter-shaped) tensors]) -> list of tensors:
    #       makes the update's gradient out of each loss's own, in the order of the learnable parameters.
    #   after_epoch(epoch, epochs) and after_training(): keep and put back averages over epochs.
    #   running_state() and load_running_state(state): tensors these need to survive a kill.
    #   solve(train, val, seed): replaces stepping altogether (see LinearProbe).
    # Optional hooks of fit; MaskTuning has both:
    #   survey(source: TrainingSource): before training, looks at what it will be trained on.
    #   figures() -> dict of numbers: after training, describes what was learned; metrics ``learned/...``.
    #   calibrate_on(data, embeddings): as calibrate below, for what needs more of the validation data than labels.
    #       DBOM has it.
    # Optional hooks of fit, for learners of frozen image embeddings:
    #   prepare(views (V, N, d), labels (N,)): before training; may replace parameters (their shape can be N).
    #   calibrate(embeddings (n, d), labels (n,)) -> dict of numbers: after training, if there are validation
    #       data; chooses what gradients don't. The numbers go into the run's metrics as ``chosen/...``.
    #   TipAdapter shows both. They may keep more in trainable_state() than parameters that take gradients.

    def train(self, mode: bool = True) -> Learner:
        """Switch the learner's own modules; the backbone stays in evaluation mode."""
        self._cached_weights = None
        return super().train(mode)

    def _weights(self) -> Tensor:
        """Class weights; in evaluation without gradients they are computed once."""
        if self.training or torch.is_grad_enabled():
            return self.class_weights()
        if self._cached_weights is None:
            self._cached_weights = self.class_weights()
        return self._cached_weights


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return why a state can't be put in the place of ``own``: what is missing, unknown, misshapen or not finite."""
    problems = [f"{n} is missing" for n in own if n not in state]
    problems += [f"{n} is unknown" for n in state if n not in own]
    for name, expected in own.items():
        got = state.get(name)
        if got is None:
            continue
        if got.shape != expected.shape:
            problems.append(f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif got.is_floating_point() != expected.is_floating_point():
            problems.append(f"{name} is {got.dtype}, expected {expected.dtype}")
        elif not bool(got.isfinite().all()):
            problems.append(f"{name} is not finite")
    return problems


def _check_classes(classnames: Sequence[str]) -> tuple[str, ...]:
    names = check_classnames(classnames, "the learner")
    if len(names) < 2:
        raise DataError(
            f"a classifier needs at least two classes, got {len(names)}: {', '.join(names) or 'none'}."
        )
    return names
