"""The base of all adapters: views of an image, a classifier to start from, and a rule that improves its prediction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.scores import known_scores
from vlprompt.adaptation.views import Images, OpenedImage, ViewPlan, open_images
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.data.base import hash_strings
from vlprompt.learners import Learner, create_learner

__all__ = ["Adapted", "Adapter", "Collector", "EncodedViews", "Granularity", "ResetScope"]

Granularity = Literal["image", "stream", "batch", "dataset"]
"""What a prediction depends on: its image alone, the images before it, those of its batch, or all images."""
ResetScope = Literal["never", "batch", "corruption", "dataset"]
"""After what an adapter forgets what it learned from images."""
_OWNER = "owner"  # of a state: who learned it
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

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def finite(self) -> Tensor:
        """(B,) mask of the images whose embeddings are all finite."""
        return self.embeddings.isfinite().all(-1).all(-1)

    def first(self, count: int) -> EncodedViews:
        """Return the first standard views alone; a plan of few views is the beginning of a plan of many."""
        if count >= self.embeddings.shape[1]:
            return self
        pixels = tuple(views[:count] for views in self.pixels)
        return EncodedViews(self.embeddings[:, :count], 0, pixels, self.seconds)

    def rows(self, rows: Sequence[int]) -> EncodedViews:
        """Return some of the images."""
        pixels = tuple(self.pixels[row] for row in rows) if self.pixels else ()
        chosen = torch.as_tensor(list(rows), dtype=torch.long)
        embeddings = self.embeddings[chosen.to(self.embeddings.device)]
        return EncodedViews(embeddings, self.generated, pixels, self.seconds[chosen])

    @classmethod
    def cat(cls, parts: Sequence[EncodedViews]) -> EncodedViews:
        """Return the images of several parts, which have equally many views."""
        if len(parts) == 1:
            return parts[0]
        pixels = tuple(views for part in parts for views in part.pixels)
        embeddings = torch.cat([part.embeddings for part in parts])
        return cls(embeddings, parts[0].generated, pixels, torch.cat([part.seconds for part in parts]))


@dataclass(frozen=True)
class Adapted:
    """What a method makes of B images.

    Attributes:
        probs: (B, C) probabilities after adaptation.
        kept: (B, V) mask of the views that were used.
        similarities: (B, C) cosines with the adapted class weights, from which scores of unknown images are computed;
            None if the method's answer is no similarity.
    """

    probs: Tensor
    kept: Tensor
    similarities: Tensor | None = None


class Adapter:
    """Base of all methods of test-time adaptation.

    A method defines :meth:`adapt`; keyword-only constructor arguments are its options. The learner it starts
    from is never changed.

    Args:
        learner: The classifier to start from.
        plan: How views are made.

    Attributes:
        granularity: What a prediction depends on. ``image``: neither the order nor the other images matter;
            ``stream``: the images before it (:meth:`reset` forgets them); ``batch``: the ``batch`` images it came with;
            ``dataset``: all images.
        batch: Images that a method of granularity ``batch`` sees together; its own option, not how many are in memory.
        updates_first: Whether the method learns from an image before it names it.
        reset_scope: After what it forgets.
        horizon: Images of the stream that the method was told of; 0 where it needs no such number.
        calibrated: Whether its probabilities are meant as such; False keeps it out of rankings by calibration.
        method: Its registry name.
        options: The options it was built with.
        needs_pixels: Whether :meth:`adapt` runs the image tower again.
        optimizer: Name of the optimiser that moves its prompts; empty if nothing is tuned.
    """

    granularity: Granularity = "image"
    calibrated: ClassVar[bool] = True
    batch: int = 0
    updates_first: bool = True
    reset_scope: ResetScope = "never"
    horizon: int = 0
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
        collected = Collector(self)
        parts = []
        for first in range(0, len(opened), _TOGETHER):
            views = self.encode(opened[first : first + _TOGETHER])
            if not bool(views.finite.all()):
                bad = [first + row for row in (~views.finite).nonzero()[:, 0].tolist()]
                raise NonFiniteError(
                    f"the embedding of image {', '.join(map(str, bad))} (from 0) is NaN or infinite."
                )
            parts += collected.add(views)
        return Predictions.cat([*parts, *collected.close()])

    def reset(self) -> None:
        """Forget everything learned from images; where images are taken alone there is nothing to forget."""

    def state(self) -> dict[str, Tensor]:
        """Return what was learned from the stream and by whom, for resuming; empty where nothing is kept."""
        learned = self.learned()
        return {**learned, _OWNER: _bytes("\n".join(self._owner()))} if learned else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned.

        Raises:
            CheckpointError: If it doesn't fit: it is of another method, backbone or list of classes, a tensor has
                another shape, or a number is NaN.
        """
        learned = {name: tensor for name, tensor in state.items() if name != _OWNER}
        if self.learned() and (difference := self._difference(state.get(_OWNER), learned)):
            raise CheckpointError(f"this state does not fit {self.method}: {difference}.")
        self.restore(learned)

    def learned(self) -> dict[str, Tensor]:
        """Return copies of what was learned from the stream; who learns overrides this and :meth:`restore`."""
        return {}

    def restore(self, learned: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`learned` returned.

        Raises:
            CheckpointError: If names, shapes or types are others.
        """
        if learned:
            raise CheckpointError(
                f"{self.method} keeps no state, but {', '.join(sorted(learned))} was given."
            )

    def _owner(self) -> tuple[str, str, str]:
        """Return whose a state is: the method, the backbone, and a hash of the class names."""
        return (self.method, self.backbone.features_id, hash_strings(self.classnames))

    def _difference(self, owner: Tensor | None, learned: Mapping[str, Tensor]) -> str:
        """Return why a state can't be this adapter's; empty if it may be."""
        own = self._owner()
        given = _text(owner).split("\n")
        if len(given) != len(own):
            return f"it does not say who learned it ({', '.join(sorted(learned)) or 'it is empty'})"

        kinds = ("method", "backbone or precision", "list of classes")
        others = [kind for kind, fact, other in zip(kinds, own, given, strict=True) if fact != other]
        if others:
            return f"it was learned with another {' and another '.join(others)}"

        spoilt = sorted(name for name, tensor in learned.items() if bool(tensor.isnan().any()))
        return f"{', '.join(spoilt)} is NaN" if spoilt else ""

    def adapt(self, views: EncodedViews) -> Adapted:
        """Return what the method makes of B images; those of one batch, or of a whole data set, come together."""
        raise NotImplementedError

    def view_identity(self) -> tuple[object, ...]:
        """Return what encoded standard views depend on beside their number.

        Adapters that return the same share the encoded views of the largest plan; a view does not depend on how many
        there are.
        """
        # Prompts in the image tower make embeddings those of one learner object.
        tower = self.backbone.features_id if self.learner.static_images else id(self.learner)
        return (self.plan.augment, self.plan.seed, tower, self.needs_pixels)

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
        """
        if standard is None:
            standard = self.encode_standard(opened)

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

    @torch.no_grad()
    def encode_standard(self, opened: Sequence[OpenedImage]) -> EncodedViews:
        """Make and encode the standard views of B images (see :meth:`encode`)."""
        return self._encode([partial(self.plan.make, image, self.backbone) for image in opened])

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

        return EncodedViews(torch.stack(rows), 0, tuple(pixels), torch.tensor(seconds))

    def predict_encoded(self, views: EncodedViews) -> Predictions:
        """Adapt to images from their encoded views (see :meth:`encode`)."""
        started = time.perf_counter()
        adapted = self.adapt(views)
        adaptation = (time.perf_counter() - started) / len(views)

        # Without adaptation the classifier sees view 0, the image itself; this is not part of the method's time.
        logits = self.view_logits(views.embeddings[:, :1])[:, 0]
        before = logits.softmax(-1)
        scores = known_scores(adapted.probs, adapted.similarities)
        unadapted = known_scores(before, logits / self.backbone.logit_scale)
        scores |= {f"before_{name}": values for name, values in unadapted.items()}

        seconds = torch.cat([views.seconds, torch.full((len(views), 1), adaptation)], dim=1)
        return Predictions(
            self.classnames,
            adapted.probs.cpu(),
            before.cpu(),
            adapted.kept.cpu(),
            seconds,
            {name: values.cpu() for name, values in scores.items()},
        )

    @torch.no_grad()
    def view_logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, V, C) logits of (B, V, d) embeddings by the classifier before adaptation."""
        # Image by image, so that the other images change no bit (see encode).
        return torch.stack([self.learner.logits(rows) for rows in embeddings])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _text(tensor: Tensor | None) -> str:
    """Return the text of bytes; empty if they are none."""
    if tensor is None or tensor.dtype != torch.uint8:
        return ""
    return bytes(tensor.flatten().tolist()).decode(errors="replace")


class Collector:
    """Hands encoded images to an adapter in the portions that it wants, whatever portions they come in.

    Images that learn alone or one after another are handed on at once; a batch when it is full; a data set when it is
    closed. The last batch may be short and is predicted, never dropped.

    Args:
        adapter: Any.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._waiting: list[EncodedViews] = []

    def add(self, views: EncodedViews) -> list[Predictions]:
        """Return the predictions that these images make possible."""
        return [self._predict(part) for part in self._portions(views)]

    def skip(self, views: EncodedViews) -> None:
        """Take images whose predictions are known already, as far as they could be made."""
        self._portions(views)

    @property
    def waiting(self) -> int:
        """How many images wait for others."""
        return sum(len(part) for part in self._waiting)

    def replace(self, views: EncodedViews) -> None:
        """Take other views of the images that wait, in their order."""
        self._waiting = [views]

    def close(self) -> list[Predictions]:
        """Return the predictions of the images that still wait."""
        if not self._waiting:
            return []
        views = EncodedViews.cat(self._waiting)
        self._waiting = []
        return [self._predict(views)]

    def _predict(self, views: EncodedViews) -> Predictions:
        predictions = self.adapter.predict_encoded(views)
        if self.adapter.granularity == "batch" and self.adapter.reset_scope == "batch":
            self.adapter.reset()
        return predictions

    def _portions(self, views: EncodedViews) -> list[EncodedViews]:
        if self.adapter.granularity in ("image", "stream"):
            return [views] if len(views) else []

        self._waiting.append(views)
        if self.adapter.granularity == "dataset":
            return []

        portions = []
        size = self.adapter.batch
        while self.waiting >= size:
            joined = EncodedViews.cat(self._waiting)
            portions.append(joined.rows(range(size)))
            self._waiting = [joined.rows(range(size, len(joined)))] if len(joined) > size else []
        return portions
