"""Tuning a learner's prompts for one image at a time, many images side by side, without touching the learner.

Nothing is computed twice. Views are encoded once, before. Every image starts from the same prompts, so the first
pass through the text tower is the same for all of them: it runs once, and the gradient of each image is a backward
pass through it. Later passes run the text tower for all images together, with prompts for each image and shared class
tokens.
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

__all__ = [
    "Answers",
    "GradientTransform",
    "ImageLoss",
    "Loss",
    "Rate",
    "Rule",
    "Tuned",
    "Tuner",
    "require_prompts",
]

Answers = Literal["image", "views"]
"""What answers under tuned prompts: the image itself, view 0, or all of its views."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes (G, V, C) logits, a (G, V) mask of views and (G, C, d) class weights; returns (G,) values to minimise."""
ImageLoss = Callable[[Callable[[], Tensor]], tuple[Tensor, Tensor]]
"""Takes the function that runs the image tower; calls it, and returns its features and a further loss."""
GradientTransform = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes gradients by name, one row per image; returns what the step uses instead, in the same shapes."""
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
        """Return a fresh optimiser; it treats each number alone, so rows do not affect each other."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Tuned:
    """The result of tuning on G images.

    Attributes:
        prompts: By name, with one row per image.
        logits: (G, C) of view 0 under these prompts, or (G, V, C) if all views answer.
    """

    prompts: dict[str, Tensor]
    logits: Tensor


class Tuner:
    """Tunes what a learner learned, for each image from the same start.

    Args:
        learner: Its prompts are the start.
        loss: See :data:`Loss`.
        rule: See :class:`Rule`.
        answers: See :data:`Answers`.
    """

    def __init__(self, learner: Learner, loss: Loss, rule: Rule, answers: Answers = "image") -> None:
        require_prompts(learner)
        self.learner = learner
        self.loss = loss
        self.rule = rule
        self.answers = answers
        self._caller = _Caller(learner)
        self._start = {
            name: parameter.detach()
            for name, parameter in learner.named_parameters()
            if parameter.requires_grad
        }
        self._first: tuple[dict[str, Tensor], Tensor] | None = None

    def start_weights(self) -> Tensor:
        """Return the (C, d) class weights that every image starts from, without a graph."""
        return self._first_pass()[1].detach()

    def tune(self, embeddings: Tensor, mask: Tensor) -> Tuned:
        """Tune on encoded views; for learners that leave the image tower alone.

        Args:
            embeddings: (G, V, d) of G images.
            mask: (G, V) mask of the views that are used.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite.
        """
        features = F.normalize(embeddings, dim=-1)
        # A row of prompts for each image; one optimiser moves them all, since it treats numbers alone.
        prompts = {}
        for name, start in self._start.items():
            prompts[name] = start.expand(len(features), *start.shape).clone()
        optimizer = self.rule.build(list(prompts.values()))

        for step in range(self.rule.steps):
            is_first = step == 0  # all images start from the same prompts
            gradients = (
                self._first_gradients(features, mask)
                if is_first
                else self._gradients(prompts, features, mask)
            )
            self._move(optimizer, prompts, gradients)

        with torch.no_grad():
            weights = self._weights(prompts)
            if self.answers == "views":
                return Tuned(prompts, self._logits(features, weights))
            return Tuned(prompts, self._logits(features[:, :1], weights)[:, 0])

    def tune_through_images(
        self, pixels: tuple[Tensor, ...], mask: Tensor, extra: ImageLoss | None = None
    ) -> Tuned:
        """Tune on pixels, image by image; for learners whose prompts enter the image tower.

        Only the kept views are run again: the others can't change the loss.

        Args:
            pixels: G tensors (V, 3, H, W).
            mask: (G, V) mask of the views that are used.
            extra: A further loss that watches the image tower.

        Raises:
            NonFiniteError: If a gradient is NaN or infinite.
        """
        tuned = [self._tune_one(views, row, extra) for views, row in zip(pixels, mask, strict=True)]
        prompts = {}
        for name in self._start:
            prompts[name] = torch.cat([one.prompts[name] for one in tuned])
        return Tuned(prompts, torch.cat([one.logits for one in tuned]))

    def _tune_one(self, views: Tensor, mask: Tensor, extra: ImageLoss | None) -> Tuned:
        """Tune on the (V, 3, H, W) views of one image with a (V,) mask; the result has one row."""
        prompts = {name: start[None].clone() for name, start in self._start.items()}
        optimizer = self.rule.build(list(prompts.values()))

        # The loss gets the kept views alone, so its own mask keeps all of them.
        used = views[mask.to(views.device)]
        all_used = torch.ones(1, len(used), dtype=torch.bool, device=views.device)

        for _ in range(self.rule.steps):
            leaves = _leaves(prompts, row=0)
            run = partial(self._features, leaves, used)
            features, further = (run(), 0.0) if extra is None else extra(run)
            weights = self._weights(leaves)
            logits = self._logits(features[None], weights[None])
            loss = self.loss(logits, all_used, weights[None]).sum() + further

            # A prompt that this loss does not reach has a gradient of 0; AdamW's decay moves it all the same.
            rows = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            gradients = {}
            for name, row in zip(leaves, rows, strict=True):
                gradients[name] = torch.zeros_like(prompts[name]) if row is None else row[None]
            self._move(optimizer, prompts, gradients)

        # With a graph: learners cache constants where no gradient is asked for, and these prompts are not theirs.
        leaves = _leaves(prompts, row=0)
        weights = self._weights(leaves).detach()
        asked = views if self.answers == "views" else views[:1]
        # View by view, since each brings its graph.
        features = torch.cat([self._features(leaves, view).detach() for view in asked.split(1)])
        logits = self._logits(features, weights)
        return Tuned(prompts, logits[None] if self.answers == "views" else logits)

    def _first_gradients(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the gradients of the first step, one row for each image.

        The loss of an image depends on a copy of the class weights; the gradient of the copy goes through the one
        shared graph to the prompts.
        """
        leaves, weights = self._first_pass()
        # Copies: the gradient with respect to shared weights would be the sum over all images.
        copies = weights.detach().expand(len(features), -1, -1).clone().requires_grad_()
        loss = self.loss(self._logits(features, copies), mask, copies).sum()
        (weight_gradients,) = torch.autograd.grad(loss, copies)

        # The graph serves all images, so it must outlive each backward pass.
        rows: dict[str, list[Tensor]] = {name: [] for name in leaves}
        for gradient in weight_gradients:
            parts = torch.autograd.grad(weights, list(leaves.values()), gradient, retain_graph=True)
            for name, part in zip(leaves, parts, strict=True):
                rows[name].append(part)
        return {name: torch.stack(parts) for name, parts in rows.items()}

    def _gradients(self, prompts: dict[str, Tensor], features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a later step, where the prompts of images differ."""
        leaves = _leaves(prompts)
        weights = self._weights(leaves)
        # Each term of the sum depends on its own row alone, so the gradient of the sum has the row of each image.
        loss = self.loss(self._logits(features, weights), mask, weights).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def _first_pass(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return the start prompts and the class weights that they give, with the graph between them; run once."""
        if self._first is None:
            leaves = _leaves(self._start)
            self._first = leaves, self._weights(leaves)
        return self._first

    def _move(
        self, optimizer: torch.optim.Optimizer, prompts: dict[str, Tensor], gradients: dict[str, Tensor]
    ) -> None:
        """Take one step; prompts change in place."""
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
    # A learner that overrides logits (an adapter, a cache ...) predicts from more than class weights.
    prompted = {"text", "vision"}
    needs = LEARNERS.get(learner.method).needs if learner.method in LEARNERS else ()
    if prompted & set(needs) and type(learner).logits is Learner.logits:
        return

    suitable = []
    for entry in LEARNERS:
        if prompted & set(entry.needs) and entry.target.logits is Learner.logits:
            suitable.append(entry.name)
    raise DataError(
        f"{learner.title()} has no prompts that test-time tuning could move. "
        f"Start from a backbone, or from one of: {', '.join(suitable)}."
    )


class _Caller(nn.Module):
    """Calls a learner's methods with other tensors in the place of its parameters."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, method: str, *arguments: Any) -> Tensor:
        return getattr(self.learner, method)(*arguments)

    def call(self, method: str, parameters: dict[str, Tensor], *arguments: Any) -> Tensor:
        renamed = {f"learner.{name}": parameter for name, parameter in parameters.items()}
        return functional_call(self, renamed, (method, *arguments))


def _leaves(tensors: dict[str, Tensor], row: int | None = None) -> dict[str, Tensor]:
    """Return tensors, or one row of each, as the start of a new graph."""
    leaves = {}
    for name, tensor in tensors.items():
        part = tensor if row is None else tensor[row]
        leaves[name] = part.detach().requires_grad_()
    return leaves
