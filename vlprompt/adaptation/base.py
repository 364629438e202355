"""The base of all adapters: views of an image, a classifier to start from, and a rule that improves its prediction."""

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

_TOGETHER = 16  # images whose views are in memory at the same time


@dataclass(frozen=True)
class EncodedViews:
    """All views of B images, after one pass through the image tower.

    Attributes:
        embeddings: (B, V, d) image embeddings, not normalised.
        generated: Number of views that come from diffusion; they are the last of the V views.
        pixels: B tensors (V, 3, H, W) if the adapter tunes the image tower; else empty.
        seconds: (B, 2) wall time, in seconds per image, of generation and of encoding.
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
        episodic: True if the adapter treats every image alone, so that neither the order nor the other images matter;
            False if it learns from the stream (:meth:`reset` forgets it).
        method: Its registry name.
        options: The options it was built with.
        needs_pixels: Whether :meth:`adapt` runs the image tower again.
        optimizer: Name of the optimiser that moves its prompts; empty if nothing is tuned.
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
        """Adapt to images and classify them.

        Args:
            images: One or several; see :func:`vlprompt.adaptation.views.open_images` for all forms.

        Raises:
            DataError: If there is no image, or one can't be read; says which. Nothing is adapted then.
            NonFiniteError: If an embedding or a gradient is NaN or infinite.
        """
        opened = open_images(images, self.backbone)
        parts = []
        for first in range(0, len(opened), _TOGETHER):
            views = self.encode(opened[first : first + _TOGETHER])
            parts.append(self.predict_encoded(views))
        return Predictions.cat(parts)

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
        """Return (B, C) probabilities and the (B, V) mask of the views that were used."""
        raise NotImplementedError

    def view_identity(self) -> tuple[object, ...]:
        """Return what encoded standard views depend on; adapters that return the same can share them."""
        # Prompts in the image tower make embeddings those of one learner object.
        tower = self.backbone.features_id if self.learner.static_images else id(self.learner)
        return (self.plan, tower, self.needs_pixels)

    def generate(self, opened: Sequence[OpenedImage]) -> list[Tensor]:
        """Return (N, 3, H, W) generated views of each image; an empty list unless a method overrides this."""
        return []

    @torch.no_grad()
    def encode(self, opened: Sequence[OpenedImage], standard: EncodedViews | None = None) -> EncodedViews:
        """Make and encode all views of B images.

        The standard views of one image are one batch of the image tower, and its generated views are another. The size
        of a batch changes the last bits of an embedding, so this is what keeps images independent of each other.

        Args:
            opened: The images.
            standard: Their standard views, if another adapter with the same :meth:`view_identity` encoded them already.

        Raises:
            DataError: If the images have different numbers of ready-made views.
            NonFiniteError: If an embedding is NaN or infinite.
        """
        if standard is None:
            standard = self._encode([partial(self.plan.make, image, self.backbone) for image in opened])

        started = time.perf_counter()
        variations = self.generate(opened)
        if not variations:
            return standard
        # A generator works on the whole batch, so its time is shared among the images.
        generation = (time.perf_counter() - started) / len(opened)

        generated = self._encode([partial(torch.as_tensor, views) for views in variations])
        seconds = standard.seconds + generated.seconds
        seconds[:, 0] += generation
        return EncodedViews(
            torch.cat([standard.embeddings, generated.embeddings], 1),
            generated.embeddings.shape[1],
            tuple(torch.cat(pair) for pair in zip(standard.pixels, generated.pixels, strict=True)),
            seconds,
        )

    def _encode(self, makers: Sequence[Callable[[], Tensor]]) -> EncodedViews:
        """Make and encode one kind of views.

        Args:
            makers: For each image, a function that makes its (V, 3, H, W) views.
        """
        rows: list[Tensor] = []
        pixels: list[Tensor] = []
        seconds: list[list[float]] = []
        for make_views in makers:
            started = time.perf_counter()
            views = make_views().to(self.backbone.device)
            rows.append(self.learner.embed_images(views))
            if self.needs_pixels:
                pixels.append(views)
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
        """Adapt to images from their encoded views (see :meth:`encode`)."""
        started = time.perf_counter()
        probs, mask = self.adapt(views)
        adaptation = (time.perf_counter() - started) / len(probs)

        # Without adaptation the classifier sees view 0, the image itself; this is not part of the method's time.
        before = self.view_logits(views.embeddings[:, :1])[:, 0].softmax(-1)
        seconds = torch.cat([views.seconds, torch.full((len(probs), 1), adaptation)], dim=1)
        return Predictions(self.classnames, probs.cpu(), before.cpu(), mask.cpu(), seconds)

    @torch.no_grad()
    def view_logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, V, C) logits of (B, V, d) embeddings by the classifier before adaptation."""
        # Image by image, so that the other images change no bit (see encode).
        return torch.stack([self.learner.logits(rows) for rows in embeddings])
