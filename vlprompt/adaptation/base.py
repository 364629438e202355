"""What every adapter is: views of an image, the classifier it starts from, and a rule that improves on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.views import Images, OpenedImage, ViewPlan, open_images
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.learners import Learner, create_learner

__all__ = ["Adapter", "EncodedViews"]

_TOGETHER = 16  # images whose views are in memory at once


@dataclass(frozen=True)
class EncodedViews:
    """All views of B images, seen by the image tower once.

    Attributes:
        embeddings: (B, V, d) image embeddings, not normalised.
        generated: How many of the V views, the last ones, came from diffusion.
        pixels: B tensors (V, 3, H, W), where the adapter tunes the image tower; else empty.
        seconds: (B, 2) wall time of generation and of encoding.
    """

    embeddings: Tensor
    generated: int
    pixels: tuple[Tensor, ...]
    seconds: Tensor


class Adapter:
    """Base of all methods of test-time adaptation.

    A method defines :meth:`adapt`; keyword-only constructor arguments are its options. The learner it starts
    from is never changed.

    Args:
        learner: The classifier to start from.
        plan: How views are made.

    Attributes:
        episodic: True if every image is adapted to on its own, so that neither order nor company matters;
            False if the adapter learns from the stream (:meth:`reset` forgets it).
        method: Its registry name.
        options: The options it was built with.
        needs_pixels: Whether :meth:`adapt` runs the image tower again.
        optimizer: What moves its prompts; empty where nothing is tuned.
    """

    episodic: ClassVar[bool] = True
    needs_pixels: bool = False
    method: str = ""
    optimizer: str = ""

    options: dict[str, Any]

    def __init__(self, learner: Learner, plan: ViewPlan) -> None:
        self.learner = learner.eval()
        self.plan = plan

    @classmethod
    def start(
        cls,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        options: Mapping[str, Any],
    ) -> Learner:
        """Return the learner that stands for a bare backbone: zero-shot classification."""
        return create_learner("zero_shot", backbone, classnames, templates)

    @property
    def classnames(self) -> tuple[str, ...]:
        """C names."""
        return self.learner.classnames

    @property
    def backbone(self) -> Backbone:
        """The frozen towers."""
        return self.learner.backbone

    def predict(self, images: Images) -> Predictions:
        """Adapt to images and name them.

        Args:
            images: One or several; see :func:`vlprompt.adaptation.views.open_images` for all forms.

        Raises:
            DataError: If there is no image, or one can't be read; says which. Nothing was adapted then.
            NonFiniteError: If an embedding or a gradient is NaN or infinite.
        """
        opened = open_images(images, self.backbone)
        parts = [opened[i : i + _TOGETHER] for i in range(0, len(opened), _TOGETHER)]
        return Predictions.cat([self.predict_encoded(self.encode(part)) for part in parts])

    def reset(self) -> None:
        """Forget everything learned from images; episodic adapters have nothing to forget."""

    def state(self) -> dict[str, Tensor]:
        """Return what was learned from the stream, for resuming; empty for episodic adapters."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned.

        Raises:
            CheckpointError: If it doesn't fit.
        """
        if state:
            raise CheckpointError(f"{self.method} keeps no state, but {', '.join(sorted(state))} was given.")

    def adapt(self, views: EncodedViews) -> tuple[Tensor, Tensor]:
        """Return (B, C) probabilities and the (B, V) mask of the views that were listened to."""
        raise NotImplementedError

    def view_identity(self) -> tuple[object, ...]:
        """Return what encoded standard views depend on: adapters that agree can share them."""
        tower = self.backbone.fingerprint["id"] if self.learner.static_images else id(self.learner)
        return (self.plan, tower, self.needs_pixels)

    def generate(self, opened: Sequence[OpenedImage]) -> list[Tensor]:
        """Return per image (N, 3, H, W) views that come from elsewhere; none unless a method overrides this."""
        return []

    @torch.no_grad()
    def encode(self, opened: Sequence[OpenedImage], standard: EncodedViews | None = None) -> EncodedViews:
        """Make and encode all views of B images.

        An image's standard views go through the image tower together and alone, and so do its generated ones, so that
        nobody's company changes a bit of anybody's embeddings.

        Args:
            opened: The images.
            standard: What another adapter of the same :meth:`view_identity` made of their standard views.

        Raises:
            DataError: If the images have different numbers of ready-made views.
            NonFiniteError: If an embedding is NaN or infinite.
        """
        if standard is None:
            standard = self._encode([partial(self.plan.make, p, self.backbone) for p in opened])
        started = time.perf_counter()
        made = self.generate(opened)
        if not made:
            return standard
        generation = (time.perf_counter() - started) / len(opened)
        generated = self._encode([partial(torch.as_tensor, views) for views in made])
        seconds = standard.seconds + generated.seconds
        seconds[:, 0] += generation
        return EncodedViews(
            torch.cat([standard.embeddings, generated.embeddings], 1),
            generated.embeddings.shape[1],
            tuple(torch.cat(p) for p in zip(standard.pixels, generated.pixels, strict=True)),
            seconds,
        )

    def _encode(self, make: Sequence[Callable[[], Tensor]]) -> EncodedViews:
        """Make and encode one kind of views."""
        rows, pixels, seconds = [], [], []
        for views_of in make:
            started = time.perf_counter()
            views = views_of().to(self.backbone.device)
            rows.append(self.learner.embed_images(views))
            pixels += [views] if self.needs_pixels else []
            seconds.append([0.0, time.perf_counter() - started])
        if len({len(row) for row in rows}) > 1:
            raise DataError("the images have different numbers of views.")
        embeddings = torch.stack(rows)
        if not bool(embeddings.isfinite().all()):
            raise NonFiniteError(
                "the embedding of a view is NaN or infinite; the backbone's weights are damaged."
            )
        return EncodedViews(embeddings, 0, tuple(pixels), torch.tensor(seconds))

    def predict_encoded(self, views: EncodedViews) -> Predictions:
        """Adapt to images whose views were encoded already (see :meth:`encode`)."""
        started = time.perf_counter()
        probs, kept = self.adapt(views)
        adaptation = (time.perf_counter() - started) / len(probs)
        before = self.view_logits(views.embeddings[:, :1])[:, 0].softmax(-1)
        seconds = torch.cat([views.seconds, torch.full((len(probs), 1), adaptation)], dim=1)
        return Predictions(self.classnames, probs.cpu(), before.cpu(), kept.cpu(), seconds)

    @torch.no_grad()
    def view_logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, V, C) logits of (B, V, d) embeddings by the classifier that is started from."""
        return torch.stack([self.learner.logits(rows) for rows in embeddings])  # one by one: see encode()
