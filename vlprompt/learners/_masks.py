"""What mask tuning decides by gradients: which updates agree with the frozen model, and which weights matter."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.reweighted import Reweight, ReweightedBackbone
from vlprompt.backbones.weight_masks import Kind, maskable
from vlprompt.core.errors import ConfigError, UnknownNameError

__all__ = [
    "Group",
    "Importance",
    "Select",
    "agreement",
    "choose",
    "gradient_dropout",
    "group_of",
    "importance",
    "mean_importance",
]

Group = Literal["attention", "mlp", "all"]
Select = Literal["all", "type", "layer", "top"]

_KINDS: dict[Group, tuple[Kind, ...]] = {
    "attention": ("attention.in", "attention.out"),
    "mlp": ("mlp.in", "mlp.out", "conv"),
    "all": ("attention.in", "attention.out", "mlp.in", "mlp.out", "conv", "patch"),
}


def agreement(task: Tensor, general: Tensor) -> Tensor:
    """Return the probability that an element of the task's gradient agrees with the general one.

    1 where the signs are the same or one is 0, else |a| / (|a| + |b|): for a task gradient a and a general one b this
    is 1/2 (1 + sign(a) (a + b) / (|a| + |b|)), the gradient sign dropout of Chen et al. (NeurIPS 2020), without the
    published code's constant in the denominator, which drops agreeing elements when gradients are small.
    """
    size = task.abs()
    opposed = task.sign() * general.sign() < 0
    return torch.where(opposed, size / (size + general.abs()), 1.0)


def gradient_dropout(task: Tensor, general: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Return the task's gradient with elements scaled by 1 - ``strength`` where chance says they disagree."""
    chance = torch.rand(task.shape, generator=generator, device=task.device, dtype=task.dtype)
    return torch.where(agreement(task, general) > chance, task, (1 - strength) * task)


def group_of(
    backbone: Backbone, group: Group, patch: bool = False, names: Sequence[str] = ()
) -> dict[str, Kind]:
    """Return the image tower's weights of a group.

    Args:
        backbone: Whose image tower.
        group: Where there are no blocks (ResNets), ``attention`` is the attention pool, ``mlp`` the convolutions of
            the residual layers.
        patch: Whether the patch embedding joins ``attention`` and ``mlp``; it is part of ``all``.
        names: Shell patterns; only weights that one of them matches.

    Raises:
        ConfigError: If the tower has none of them.
        UnknownNameError: If a pattern matches none of the tower's weights.
    """
    weights = maskable(backbone.vision.visual)
    for pattern in names:
        if not fnmatch.filter(weights, pattern):
            raise UnknownNameError("weight of the image tower", pattern, list(weights))

    kinds = _KINDS[group]
    if patch:
        kinds = (*kinds, "patch")

    members = {}
    for name, kind in weights.items():
        matches = not names or any(fnmatch.fnmatchcase(name, pattern) for pattern in names)
        if kind in kinds and matches:
            members[name] = kind

    if not members:
        matching = f" that match {', '.join(names)}" if names else ""
        others = ", ".join(sorted(set(weights.values()))) or "none"
        raise ConfigError(
            [
                f"the image tower of {backbone.name} has no weights to mask in {' or '.join(kinds)}{matching}. It has: "
                f"{others}. mmt masks MLPs and convolutions, pmt masks all."
            ],
            "mask tuning",
        )
    return members


@dataclass(frozen=True)
class Importance:
    """How much a task's loss depends on one weight tensor, per element, zero-shot.

    Attributes:
        gradient: Mean |dL/dw|.
        saliency: Mean |w dL/dw|, which is the mask's gradient.
        count: Elements; ``gradient * count`` is the sum.
    """

    gradient: float
    saliency: float
    count: int


def importance(
    backbone: Backbone, class_weights: Tensor, batches: Iterable[Mapping[str, Tensor]], names: Iterable[str]
) -> dict[str, Importance]:
    """Return each weight's importance for zero-shot classification of labelled images, a mean over batches.

    The paper selects parameters by gradients but its reachable text gives no formula; this one is ours.

    Args:
        backbone: Frozen.
        class_weights: (C, d).
        batches: With ``"image"`` and ``"label"``.
        names: Of :func:`vlprompt.backbones.weight_masks.maskable`.
    """
    leaves: dict[str, Tensor] = {}

    def use(name: str) -> Reweight:
        """Return a function that puts a differentiable copy into the weight's place, and remembers it."""

        def make(weight: Tensor) -> Tensor:
            return leaves.setdefault(name, weight.detach().requires_grad_())

        return make

    view = ReweightedBackbone(backbone, {name: use(name) for name in names})

    sums: dict[str, tuple[float, float]] = {}
    count = 0
    for batch in batches:
        with torch.enable_grad():
            features = F.normalize(view.image_embeddings(batch["image"]), dim=-1)
            logits = backbone.logit_scale * features @ class_weights.T
            loss = F.cross_entropy(logits, batch["label"].to(logits.device))
            gradients = torch.autograd.grad(loss, list(leaves.values()))

        count += 1
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            plain, salient = sums.get(name, (0.0, 0.0))
            salience = float((gradient * leaf.detach()).abs().mean())
            sums[name] = plain + float(gradient.abs().mean()), salient + salience

    return {
        name: Importance(plain / count, salient / count, leaves[name].numel())
        for name, (plain, salient) in sums.items()
    }


def mean_importance(by_task: Sequence[Mapping[str, Importance]]) -> dict[str, Importance]:
    """Return the mean over tasks of each weight's importance."""
    means = {}
    for name, first in by_task[0].items():
        gradient = sum(task[name].gradient for task in by_task) / len(by_task)
        saliency = sum(task[name].saliency for task in by_task) / len(by_task)
        means[name] = Importance(gradient, saliency, first.count)
    return means


def choose(
    importances: Mapping[str, Importance], kinds: Mapping[str, Kind], how: Select, share: float, count: int
) -> list[str]:
    """Return the names of the weights to mask.

    Args:
        importances: See :func:`importance`.
        kinds: What each weight is.
        how: ``type``: weights of the kinds whose mean gradient is at least the mean over kinds; ``layer``: weights
            whose mean gradient is at least ``share`` of the largest; ``top``: the ``count`` weights with the largest;
            ``all``: every one.
        share: See ``layer``.
        count: See ``top``.
    """
    scores = {name: value.gradient for name, value in importances.items()}

    if how == "layer":
        return [name for name, score in scores.items() if score >= share * max(scores.values())]

    if how == "top":
        best = sorted(scores, key=lambda name: -scores[name])[:count]
        return [name for name in scores if name in best]

    if how == "type":
        by_kind: dict[str, list[Importance]] = {}
        for name, value in importances.items():
            by_kind.setdefault(kinds[name], []).append(value)

        # Means over elements, so that a large tensor counts for more than a small one of its kind.
        means = {}
        for kind, values in by_kind.items():
            total = sum(value.gradient * value.count for value in values)
            means[kind] = total / sum(value.count for value in values)
        mean = sum(means.values()) / len(means)
        return [name for name in scores if means[kinds[name]] >= mean]

    return list(scores)
