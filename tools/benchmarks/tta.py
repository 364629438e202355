"""Test-time prompt tuning against the reference's way, for one image at a time.

The reference's way, in every step: all views through the image tower, every class's sentence padded to its full
length through the text tower, backward; then both towers once more for the prediction. Ours encodes every view once,
shares the first step's pass through the text tower between all images, and never pads. Both end at the same logits.

The naive text pass is run in chunks of classes, because all of 1,000 classes' graphs need more than 32 GiB; each
chunk is given the loss's pull at its own text features, and what it takes to know these is not counted.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import BENCHMARKS
from benchmarks.measure import Aside, Turns, Work, in_turns
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
        precision: If it is half precision, ours is measured in it too, in turns with the others in float32.
        repeats: Counted rounds of ours and the naive way.
        naive: False measures ours alone.
    """
    model = create_backbone(backbone)
    adapter = _adapter(model, classes, steps)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(views, 3, *model.image_size, generator=generator)
    embeddings = model.image_embeddings(pixels)
    # Noise looks alike to a tower; what is measured doesn't depend on what the other images show.
    spread = embeddings + embeddings.std() * torch.randn(images, *embeddings.shape, generator=generator)
    encoded = EncodedViews(torch.cat([embeddings[None], spread[1:]]), 0, (), torch.zeros(images, 2))
    slow = _Naive(adapter, pixels, steps)
    ways = _ours(adapter, pixels, encoded)

    if precision != "fp32":
        narrow = create_backbone(backbone, precision=precision)
        half = _adapter(narrow, classes, steps)
        ways |= {f"half {stage}": work for stage, work in _ours(half, pixels, encoded).items()}

    for work in ways.values():
        work()
    turns = in_turns({**ways, "naive": slow} if naive else ways, repeats, warmup=0)
    encoding, adaptation = turns["encoding"], turns["adaptation"]
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

    if precision != "fp32":
        seconds = [turns[f"half {stage}"].seconds for stage in ("encoding", "adaptation")]
        difference = adapter.adapt(encoded).probs - half.adapt(encoded).probs
        result[precision] = {
            "encoding_s": seconds[0],
            "adaptation_s": seconds[1] / images,
            "over_fp32": _ratio(turns, images, "", "half "),
            "max_abs_diff_probs": float(difference.abs().max()),
        }

    if not naive:
        return result

    slow_measured = turns["naive"]
    naive_s = slow_measured.seconds
    if precision != "fp32":
        result[precision]["speedup"] = _ratio(turns, images, None, "half ")
    ours = adapter.adapt(EncodedViews(embeddings[None], 0, (), torch.zeros(1, 2))).probs[0]
    return {
        **result,
        "naive_encoding_s": slow.encoding,
        "naive_adaptation_s": naive_s - slow.encoding,
        "naive_s": naive_s,
        "naive_peak_rss_gib": slow_measured.peak_rss_gib,
        "naive_classes_per_pass": min(classes, _NAIVE_CHUNK),
        "speedup": _ratio(turns, images, None, ""),
        "quiet": turns.quiet,
        "speedup_adaptation": (naive_s - slow.encoding) / result["ours_adaptation_s"],
        "max_abs_diff_probs": float((slow.probs - ours).abs().max()),
        "adaptation_moved_probs": float((slow.probs - slow.before).abs().max()),
    }


def _ours(adapter: PromptAdapter, pixels: Tensor, encoded: EncodedViews) -> dict[str, Work]:
    """Return the two stages of ours: encoding the views of one image, and adapting to all images side by side."""
    adapter.together = len(encoded.embeddings)
    adapter.tuner.start_weights()  # once per class list, not per image
    return {
        "encoding": lambda: adapter.backbone.image_embeddings(pixels),
        "adaptation": lambda: adapter.adapt(encoded),
    }


def _ratio(turns: Turns, images: int, way: str | None, over: str) -> float:
    """Return the seconds per image of one way over those of another: the median over rounds.

    Args:
        turns: What was measured.
        images: How many were adapted to side by side.
        way: What the names of its two stages begin with; None stands for the naive way, which is one piece.
        over: As ``way``.
    """

    def seconds(number: int, prefix: str) -> float:
        encoding, adaptation = (
            turns.runs[f"{prefix}{stage}"][number] for stage in ("encoding", "adaptation")
        )
        return encoding.seconds + adaptation.seconds / images

    rounds = range(len(turns.runs[f"{over}encoding"]))
    return statistics.median(
        (turns.runs["naive"][n].seconds if way is None else seconds(n, way)) / seconds(n, over)
        for n in rounds
    )


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
    """

    def __init__(self, adapter: PromptAdapter, pixels: Tensor, steps: int) -> None:
        self.adapter = adapter
        self.pixels = pixels
        self.steps = steps
        self.encoding = 0.0
        self.probs = self.before = torch.empty(0)

    def __call__(self) -> Aside:
        """Adapt; returns what only the chunking needs, which is not the reference's."""
        self.encoding = 0.0
        self.aside = Aside()
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
        return self.aside

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

        with self.aside.running(), torch.no_grad():
            text = self.adapter.backbone.text
            weights_leaf = text.encode(context_layout(text, self.adapter.classnames, len(leaf)), leaf)
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
