"""ConES for classification: search class vectors where text features lie, without the text tower.

Paper: Yi et al., "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models", arXiv
2305.18993. The paper is about detection, segmentation and generation; no code was published. Reconstructed here, as a
classifier: vectors in the joint space (or in front of the text projection) that start from the class names' features
and are scored by cosine, which makes it a relative of task residuals (Yu et al., CVPR 2023).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.image_only import image_backbone, without_text
from vlprompt.concepts.embedding import (
    ConceptEmbedding,
    Concepts,
    Share,
    normal_start,
    repeated,
    visual_start,
)
from vlprompt.core.errors import BackboneError, CheckpointError, DataError
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["ConES", "concept_classifier"]

_START = "concepts.start"


@LEARNERS.register(
    "cones", summary="class vectors searched where text features lie, no text tower", paper="2305.18993"
)
class ConES(Learner):
    """Class c has L vectors E_c = start + learned offset; its logit pools tau * cosine(image, E_cl) over l.

    The text tower runs once, when the start is first needed; with saved vectors it never does.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; their features are averaged into the start.
        length: L, sub-concepts per class.
        init: ``text``: the class names' features, so that training starts as zero-shot; ``normal``: noise of their
            spread; ``visual``: mean image features of the training images.
        share: A learned offset per class, or one for all classes, which then works for other classes too.
        space: ``joint``, or ``text``: in front of the text projection, which keeps what it keeps.
        pool: Mean of the sub-concepts' logits, or log of their mean exponential (any sub-concept may fit).
        jitter: How far the L starts of a class lie apart, as a share of a feature's length.
        seed: Of noise.

    Raises:
        BackboneError: If ``space`` is ``text`` and there is no text projection that is a plain matrix.
    """

    recipe = Recipe(
        {
            "lr": 1e-4,
            "batch_size": 256,
            "epochs": 100,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_epochs": 0.0,
            "drop_last": False,
        }
    )

    prepares = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        length: Annotated[int, Field(ge=1, le=64)] = 1,
        init: Literal["text", "normal", "visual"] = "text",
        share: Share = "class",
        space: Literal["joint", "text"] = "joint",
        pool: Literal["mean", "logsumexp"] = "mean",
        jitter: Annotated[float, Field(ge=0)] = 0.05,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.class_bound = share == "class" or init != "text"
        self.length = length
        self.init = init
        self.share = share
        self.pool = pool
        self.jitter = jitter
        self.seed = seed

        projection = _projection(backbone) if space == "text" else None
        self.register_buffer("projection", projection, persistent=False)

        width = backbone.dim if projection is None else len(projection)
        self.concepts = ConceptEmbedding(len(self.classnames), length, width, share)

    def vectors(self) -> Tensor:
        """Return (C, L, d) vectors of the joint space, not normalised."""
        self._begin()
        vectors = self.concepts()
        projection = self.get_buffer("projection")
        return vectors if projection is None else vectors @ projection

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; with L > 1 the mean of unit vectors, shorter than one."""
        units = F.normalize(self.vectors(), dim=-1)
        return units[:, 0] if self.length == 1 else units.mean(1)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        if self.pool == "mean" or self.length == 1:
            return super().logits(embeddings)
        units = F.normalize(self.vectors(), dim=-1).flatten(0, 1)
        scores = self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ units.T
        return scores.unflatten(1, (-1, self.length)).logsumexp(-1) - math.log(self.length)

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """Start from the (V, n, d) embeddings of the training images, if that is what ``init`` asks for."""
        if self.init != "visual":
            return

        features = views.to(self.backbone.device).flatten(0, 1)
        repeated_labels = labels.repeat(len(views)).to(features.device)
        start = visual_start(features, repeated_labels, self.classnames, norm=1.0)

        projection = self.get_buffer("projection")
        if projection is not None:  # the shortest vectors that the projection maps there
            start = start @ torch.linalg.pinv(projection)

        self.concepts.begin(repeated(start, self.length, self.jitter, self.seed))

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Learner.trainable_state`; with the start, unless other classes have another."""
        state = super().trainable_state()
        if not self.class_bound:
            return state
        self._begin()
        assert self.concepts.start is not None
        return {**state, _START: self.concepts.start}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`."""
        start = state.get(_START) if self.class_bound else None
        if self.class_bound:
            self._check_start(start)
        rest = {name: t for name, t in state.items() if name != _START or not self.class_bound}
        super().load_trainable_state(rest)
        if start is not None:
            self.concepts.start = start.detach().float().to(self.concepts.offset.device).clone()

    def to_concepts(self) -> Concepts:
        """Return the vectors as a file's content: without text tower, projection or names to encode."""
        facts = {"pool": self.pool, "templates": list(self.templates)}
        host = without_text(self.backbone).fingerprint
        return Concepts("classifier", self.vectors().detach(), self.classnames, _identity(host), facts)

    def _check_start(self, start: Tensor | None) -> None:
        """Refuse a saved start that is missing, misshapen or not finite."""
        problem = "is missing"
        if start is not None:
            problem = "is not finite" if not bool(start.isfinite().all()) else ""
            if tuple(start.shape) != self.concepts.shape:
                problem = f"has shape {tuple(start.shape)}, expected {self.concepts.shape}"
        if problem:
            raise CheckpointError(f"this state does not fit {self.method or 'cones'}: {_START} {problem}.")

    def _begin(self) -> None:
        """Let the text tower say where the search starts, once, if nothing else has."""
        if self.concepts.start is not None:
            return
        if self.init == "visual":
            raise DataError("init='visual' starts from training images: train with vlprompt.fit first.")

        text = self._text_features()
        if self.init == "text":
            start = repeated(text, self.length, self.jitter, self.seed)
        else:
            start = normal_start(self.concepts.shape, text, self.seed)
        self.concepts.start = start.to(self.concepts.offset.device)

    def _text_features(self) -> Tensor:
        """Return (C, width) means over templates, each template's joint feature of unit length."""
        sentences = [t.format(c) for c in self.classnames for t in self.templates]

        projection = self.get_buffer("projection")
        if projection is None:
            features = self.backbone.encode_text(sentences)
        else:
            tower = copy.copy(self.backbone.text)
            tower.projection = None  # the states in front of it
            states = tower.encode_strings(sentences)
            features = states / (states @ projection).norm(dim=-1, keepdim=True)

        return features.unflatten(0, (len(self.classnames), len(self.templates))).mean(1)


def concept_classifier(path: str | Path, backbone: Backbone | None = None) -> ConES:
    """Return a classifier with saved vectors (of :meth:`ConES.to_concepts`); no text tower is loaded or asked.

    Args:
        path: The concept file.
        backbone: The image side; None builds it from the file's facts.

    Raises:
        CheckpointError: If the file does not fit, or belongs to another image tower; names the difference.
        BackboneError: If the image tower can't be had.
    """
    concepts = Concepts.load(path, "classifier")

    if backbone is None:
        backbone = image_backbone(str(concepts.host["architecture"]), concepts.host.get("pretrained"))
    concepts.check_host(_identity(without_text(backbone).fingerprint), path)

    learner = ConES(
        backbone,
        concepts.names,
        concepts.facts["templates"],
        length=concepts.vectors.shape[1],
        pool=concepts.facts["pool"],
    )
    learner.method = "cones"
    learner.concepts.begin(concepts.vectors)
    return learner.to(backbone.device).eval()


def _identity(fingerprint: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in fingerprint.items() if k != "id"}


def _projection(backbone: Backbone) -> Tensor:
    """Return the text tower's (Dt, d) projection.

    Raises:
        BackboneError: If there is none that is a plain matrix.
    """
    text = backbone.text
    projection = None if text.refusal is not None else text.projection

    if isinstance(projection, nn.Linear) and projection.bias is None:
        projection = projection.weight.T
    if not isinstance(projection, Tensor):
        raise BackboneError(
            f"space='text' needs a text projection that is a plain matrix; {backbone.name} has "
            f"{'none' if projection is None else 'one with a bias'}. Use space='joint'."
        )

    return projection.detach().float()
