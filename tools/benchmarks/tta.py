"""Test-time prompt tuning against the reference's way, for one image at a time.

The reference's way, in every step: all views through the image tower, every class's sentence padded to its full
length through the text tower, backward; then both towers once more for the prediction. Ours encodes every view once,
shares the first step's pass through the text tower between all images, and never pads. Both end at the same logits.

The naive text pass is run in chunks of classes, because all of 1,000 classes' graphs need more than 32 GiB; each
chunk is given the loss's pull at its own text features, and what it takes to know these is not counted.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks.measure import measure
from benchmarks.precision import compare_pairs
from benchmarks.text import imagenet_names
from vlprompt.adaptation import create_adapter
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rule
from vlprompt.adaptation.base import EncodedViews
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.layout import PromptLayout
from vlprompt.core.errors import VLPromptError
from vlprompt.core.precision import Precision
from vlprompt.learners._context import context_layout

__all__ = ["bench_tta"]

_NAIVE_CHUNK = 100


@BENCHMARKS.register("tta", summary="test-time prompt tuning of an image, ours against the reference's way")
def bench_tta(
    *,
    backbone: str = "ViT-B-16",
    classes: int = 100,
    views: int = 64,
    steps: int = 1,
    images: int = 4,
    precision: Precision = "fp32",
    repeats: int = 3,
    naive: bool = True,
) -> dict[str, Any]:
    """Compare the seconds per image on random weights, noise for views and ImageNet's class names.

    Args:
        backbone: Any open_clip architecture, or tiny.
        classes: C.
        views: V of every image.
        steps: Updates per image.
        images: Images that ours adapts to side by side; encoding is measured on one.
        precision: Of ours; in half precision ours is measured in float32 too, in turns.
        repeats: Counted runs of ours; the naive way is run once.
        naive: False measures ours alone.
    """
    model = create_backbone(backbone)
    adapter = _adapter(model, classes, steps)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(views, 3, *model.image_size, generator=generator)
    encoding = measure(lambda: model.image_embeddings(pixels), repeats)
    embeddings = model.image_embeddings(pixels)
    adapter.together = images
    # Noise looks alike to a tower; what is measured doesn't depend on what the other images show.
    spread = embeddings + embeddings.std() * torch.randn(images, *embeddings.shape, generator=generator)
    encoded = EncodedViews(torch.cat([embeddings[None], spread[1:]]), 0, (), torch.zeros(images, 2))
    adapter.tuner.start_weights()  # once per class list, not per image
    adaptation = measure(lambda: adapter.adapt(encoded), repeats)
    result: dict[str, Any] = {
        "backbone": backbone,
        "classes": classes,
        "views": views,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "ours_encoding_s": encoding.seconds,
        "ours_adaptation_s": adaptation.seconds / images,
        "ours_s": encoding.seconds + adaptation.seconds / images,
        "ours_peak_rss_gib": adaptation.peak_rss_gib,
    }

    half: dict[str, Any] = {}
    if precision != "fp32":
        half = _in_half(
            adapter, copy.deepcopy(model).set_precision(precision), pixels, encoded, steps, repeats
        )
        result[precision] = half

    if not naive:
        return result

    slow = _Naive(adapter, pixels, steps)
    slow_measured = measure(slow, 1, warmup=0)
    naive_s = slow_measured.seconds - slow.aside
    if half:
        half["speedup"] = naive_s / half["ours_s"]
    ours = adapter.adapt(EncodedViews(embeddings[None], 0, (), torch.zeros(1, 2)))[0][0]
    return {
        **result,
        "naive_encoding_s": slow.encoding,
        "naive_adaptation_s": naive_s - slow.encoding,
        "naive_s": naive_s,
        "naive_peak_rss_gib": slow_measured.peak_rss_gib,
        "naive_classes_per_pass": min(classes, _NAIVE_CHUNK),
        "speedup": naive_s / result["ours_s"],
        "speedup_adaptation": (naive_s - slow.encoding) / result["ours_adaptation_s"],
        "max_abs_diff_probs": float((slow.probs - ours).abs().max()),
        "adaptation_moved_probs": float((slow.probs - slow.before).abs().max()),
    }


def _in_half(
    full: PromptAdapter, model: Backbone, pixels: Tensor, encoded: EncodedViews, steps: int, repeats: int
) -> dict[str, Any]:
    """Measure ours on a backbone in half precision, in turns with ours in float32."""
    adapter = _adapter(model, len(full.classnames), steps)
    adapter.together = full.together
    adapter.tuner.start_weights()
    encoding = compare_pairs(
        lambda: full.backbone.image_embeddings(pixels),
        lambda: model.image_embeddings(pixels),
        repeats,
        model.precision,
    )
    adaptation = compare_pairs(
        lambda: full.adapt(encoded), lambda: adapter.adapt(encoded), repeats, model.precision
    )

    exact = full.adapt(encoded)[0]
    rough = adapter.adapt(encoded)[0]
    return {
        "encoding": encoding,
        "adaptation": adaptation,
        "ours_s": encoding["seconds"] + adaptation["seconds"] / len(encoded.embeddings),
        "max_abs_diff_probs": float((exact - rough).abs().max()),
    }


def _adapter(backbone: Backbone, classes: int, steps: int) -> PromptAdapter:
    adapter = create_adapter("tpt", backbone, imagenet_names(classes), steps=steps)
    if not isinstance(adapter, PromptAdapter) or "context" not in dict(adapter.learner.named_parameters()):
        raise VLPromptError(f"{backbone.name} can't be benchmarked: its text tower takes no context.")
    return adapter


class _Naive:
    """One image's episode the reference's way.

    Attributes:
        probs: (C,) what it ended with.
        before: (C,) what it started from.
        encoding: Seconds of the image tower.
        aside: Seconds of what only the chunking needs, which are not the reference's.
    """

    def __init__(self, adapter: PromptAdapter, pixels: Tensor, steps: int) -> None:
        self.adapter = adapter
        self.pixels = pixels
        self.steps = steps
        self.encoding = self.aside = 0.0
        self.probs = self.before = torch.empty(0)

    def __call__(self) -> None:
        tower = self.adapter.backbone.text
        names = self.adapter.classnames
        start = dict(self.adapter.learner.named_parameters())["context"].detach()
        layouts = [
            context_layout(tower, names[i : i + _NAIVE_CHUNK], len(start))
            for i in range(0, len(names), _NAIVE_CHUNK)
        ]
        context = start.clone()
        optimizer = Rule(self.steps).build([context])
        chosen = None

        for _ in range(self.steps):
            features = self._features(self.pixels)
            leaf = context.detach().requires_grad_()
            gradient, chosen = self._backward(layouts, features, leaf, chosen)
            context.grad = gradient
            optimizer.step()

        with torch.no_grad():
            logits = self._features(self.pixels[:1]) @ self._weights(layouts, context).T
            self.probs = (self.adapter.backbone.logit_scale * logits)[0].softmax(-1)

    def _features(self, pixels: Tensor) -> Tensor:
        started = time.perf_counter()
        features = self.adapter.backbone.encode_image(pixels)
        self.encoding += time.perf_counter() - started
        return features

    def _backward(
        self, layouts: list[PromptLayout], features: Tensor, leaf: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient and the chosen views; in one pass, or with the pull taken from our own features."""
        if len(layouts) == 1:
            weights = self._weights(layouts, leaf)
            loss, chosen = self._loss(features, weights, chosen)
            return torch.autograd.grad(loss, leaf)[0], chosen

        started = time.perf_counter()

        with torch.no_grad():
            text = self.adapter.backbone.text
            weights_leaf = text.encode(context_layout(text, self.adapter.classnames, len(leaf)), leaf)

        self.aside += time.perf_counter() - started
        weights_leaf = F.normalize(weights_leaf, dim=-1).requires_grad_()
        loss, chosen = self._loss(features, weights_leaf, chosen)
        (pull,) = torch.autograd.grad(loss, weights_leaf)
        total = torch.zeros_like(leaf)

        for layout, part in zip(layouts, pull.split(_NAIVE_CHUNK), strict=True):
            total += torch.autograd.grad(self._weights([layout], leaf), leaf, part)[0]
        return total, chosen

    def _loss(self, features: Tensor, weights: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.adapter.backbone.logit_scale * features @ weights.T
        if chosen is None:
            self.before = logits[0].detach().softmax(-1)
            chosen = self.adapter.select(logits[None], features[None], 0)[0]
        return marginal_entropy(logits[chosen]), chosen

    def _weights(self, layouts: list[PromptLayout], context: Tensor) -> Tensor:
        tower = self.adapter.backbone.text
        full = tower.context_length
        return F.normalize(torch.cat([tower.encode_plain(x, context, length=full) for x in layouts]), dim=-1)
