"""Tuning a learner's prompts for one image at a time, many images side by side, without touching the learner.

Nothing is computed twice. Views are encoded before, once. Every image starts from the same prompts, so the first
step's pass through the text tower is the same for all of them: it is run once, and an image's own gradient is a
backward pass through it. Later passes run the text tower for all images together, prompts per image, class
tokens shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.learners import LEARNERS, Learner

__all__ = ["GradientTransform", "ImageLoss", "Loss", "Rate", "Rule", "Tuned", "Tuner", "require_prompts"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of (G, V, C) logits, a (G, V) mask of views and (G, C, d) class weights: (G,) values to make small."""
ImageLoss = Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]]
"""Runs the image tower through the function it gets and returns its features and a further loss."""
GradientTransform = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Of gradients by name, one row per image: what the step uses in their place, of the same shapes."""
Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Rule:
    """How prompts move.

    Attributes:
        steps: Updates per image.
        lr: Learning rate; the first step of AdamW moves every number by about this much, whatever its gradient.
        optimizer: ``"adamw"`` or ``"sgd"``, fresh for every image.
        weight_decay: Of AdamW; moves the prompts even where the gradient is 0.
        transform: Applied to the gradients before the step.
    """

    steps: int = 1
    lr: float = 5e-3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    transform: GradientTransform | None = None

    def build(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Return an optimiser without memory; it works number by number, so rows don't see each other."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Tuned:
    """What tuning gave: prompts by name with one row per image, and the logits of view 0 under them, (G, C)."""

    prompts: dict[str, Tensor]
    logits: Tensor


class Tuner:
    """Tunes what a learner learned, for each image from the same start.

    Args:
        learner: Its prompts are the start.
        loss: See :data:`Loss`.
        rule: See :class:`Rule`.
    """

    def __init__(self, learner: Learner, loss: Loss, rule: Rule) -> None:
        require_prompts(learner)
        self.learner, self.loss, self.rule = learner, loss, rule
        self._caller = _Caller(learner)
        self._start = {n: p.detach() for n, p in learner.named_parameters() if p.requires_grad}
        self._first: tuple[dict[str, Tensor], Tensor] | None = None

    def start_weights(self) -> Tensor:
        """Return the (C, d) class weights that every image starts from, without a graph."""
        return self._first_pass()[1].detach()

    def tune(self, embeddings: Tensor, kept: Tensor) -> Tuned:
        """Tune on encoded views; for learners that leave the image tower alone.

        Args:
            embeddings: (G, V, d) of G images.
            kept: (G, V) mask of the views to listen to.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite.
        """
        features = F.normalize(embeddings, dim=-1)
        prompts = {n: p.expand(len(features), *p.shape).clone() for n, p in self._start.items()}
        optimizer = self.rule.build(list(prompts.values()))
        for step in range(self.rule.steps):
            gradients = (
                self._first_gradients(features, kept)
                if step == 0
                else self._gradients(prompts, features, kept)
            )
            self._move(optimizer, prompts, gradients)
        with torch.no_grad():
            weights = self._weights(prompts)
            return Tuned(prompts, self._logits(features[:, :1], weights)[:, 0])

    def tune_through_images(
        self, pixels: tuple[Tensor, ...], kept: Tensor, extra: ImageLoss | None = None
    ) -> Tuned:
        """Tune on pixels, image by image; for learners whose prompts enter the image tower.

        Only the kept views are run again: the others can't change the loss.

        Args:
            pixels: G tensors (V, 3, H, W).
            kept: (G, V) mask of the views to listen to.
            extra: A further loss that watches the image tower.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite.
        """
        tuned = [self._tune_one(views, mask, extra) for views, mask in zip(pixels, kept, strict=True)]
        prompts = {n: torch.cat([t.prompts[n] for t in tuned]) for n in self._start}
        return Tuned(prompts, torch.cat([t.logits for t in tuned]))

    def _tune_one(self, views: Tensor, mask: Tensor, extra: ImageLoss | None) -> Tuned:
        prompts = {n: p[None].clone() for n, p in self._start.items()}
        optimizer = self.rule.build(list(prompts.values()))
        listened = views[mask.to(views.device)]
        everything = torch.ones(1, len(listened), dtype=torch.bool, device=views.device)
        for _ in range(self.rule.steps):
            leaves = _leaves(prompts, row=0)
            run = partial(self._features, leaves, listened)
            features, further = (run(), 0.0) if extra is None else extra(run)
            weights = self._weights(leaves)
            loss = self.loss(self._logits(features[None], weights[None]), everything, weights[None]).sum()
            found = torch.autograd.grad(loss + further, list(leaves.values()), allow_unused=True)
            gradients = {
                n: torch.zeros_like(prompts[n]) if g is None else g[None]
                for n, g in zip(leaves, found, strict=True)
            }
            self._move(optimizer, prompts, gradients)
        # Learners remember constants where no gradient is asked for; these prompts are not theirs.
        leaves = _leaves(prompts, row=0)
        logits = self._logits(self._features(leaves, views[:1]), self._weights(leaves))
        return Tuned(prompts, logits.detach())

    def _first_gradients(self, features: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """At the start the loss pulls at each image's own weights; one shared graph takes that to the prompts."""
        leaves, weights = self._first_pass()
        own = weights.detach().expand(len(features), -1, -1).clone().requires_grad_()
        loss = self.loss(self._logits(features, own), kept, own).sum()
        (pulls,) = torch.autograd.grad(loss, own)
        rows = [torch.autograd.grad(weights, list(leaves.values()), p, retain_graph=True) for p in pulls]
        return {n: torch.stack(parts) for n, parts in zip(leaves, zip(*rows, strict=True), strict=True)}

    def _gradients(self, prompts: dict[str, Tensor], features: Tensor, kept: Tensor) -> dict[str, Tensor]:
        leaves = _leaves(prompts)
        weights = self._weights(leaves)
        loss = self.loss(self._logits(features, weights), kept, weights).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def _first_pass(self) -> tuple[dict[str, Tensor], Tensor]:
        if self._first is None:
            leaves = _leaves(self._start)
            self._first = leaves, self._weights(leaves)
        return self._first

    def _move(
        self, optimizer: torch.optim.Optimizer, prompts: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> None:
        if self.rule.transform is not None:
            gradients = self.rule.transform(gradients)
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"the gradient of {name} is NaN or infinite; an image can't be adapted to."
                )
            prompts[name].grad = gradient
        optimizer.step()

    def _weights(self, prompts: dict[str, Tensor]) -> Tensor:
        return self._caller.call("class_weights", prompts)

    def _features(self, prompts: dict[str, Tensor], images: Tensor) -> Tensor:
        return F.normalize(self._caller.call("embed_images", prompts, images), dim=-1)

    def _logits(self, features: Tensor, weights: Tensor) -> Tensor:
        return self.learner.backbone.logit_scale * features @ weights.transpose(-1, -2)


def require_prompts(learner: Learner) -> None:
    """Refuse a learner without prompts to tune, or whose classifier is more than class weights.

    Raises:
        DataError: Says which learners can be adapted.
    """
    prompted = {"text", "vision"}
    needs = LEARNERS.get(learner.method).needs if learner.method in LEARNERS else ()
    if not prompted & set(needs) or type(learner).logits is not Learner.logits:
        known = [e.name for e in LEARNERS if prompted & set(e.needs) and e.target.logits is Learner.logits]
        raise DataError(
            f"{learner.method or type(learner).__name__} has no prompts that test-time tuning could move. "
            f"Start from a backbone, or from one of: {', '.join(known)}."
        )


class _Caller(nn.Module):
    """Calls a learner's methods with other tensors in the place of its parameters."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, method: str, *arguments: Any) -> Tensor:
        return getattr(self.learner, method)(*arguments)

    def call(self, method: str, parameters: dict[str, Tensor], *arguments: Any) -> Tensor:
        renamed = {f"learner.{n}": p for n, p in parameters.items()}
        return functional_call(self, renamed, (method, *arguments))


def _leaves(tensors: dict[str, Tensor], row: int | None = None) -> dict[str, Tensor]:
    """Return tensors, or one row of each, as the start of a new graph."""
    return {n: (t if row is None else t[row]).detach().requires_grad_() for n, t in tensors.items()}
