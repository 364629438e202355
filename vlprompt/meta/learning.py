"""The two-level problem: prompts and regulator such that one regulated step on a domain helps on another.

    inner   theta' = theta - alpha R_phi(g),  g = grad L_support(theta)
    outer   min over theta, phi of the mean over episodes of L_query(theta')

First order, the default, takes g as a constant: theta gets the query's gradient at theta' (Finn et al., ICML 2017,
section 5.2), phi its exact gradient -alpha (dR/dphi)^T grad L_query(theta'), so that the regulator learns to keep what
also helps in a domain it did not see. That prompts and regulator are learned together is the paper's claim; sizes,
optimiser and the first-order step are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.learners import Learner
from vlprompt.meta.episodes import Episode, Side
from vlprompt.meta.functional import Batch, Functional, prompt_shapes
from vlprompt.meta.options import MetaOptions
from vlprompt.meta.regulators import PROMPTS, Regulator, Situation, create_regulator

__all__ = ["Adapted", "MetaPrompts"]

Theta = dict[str, Tensor]
_CLIP = 1.0  # largest norm of the prompts' outer gradient, and of the regulator's


class Adapted:
    """What the inner steps gave.

    Attributes:
        theta: Prompts behind them.
        regulated: The last step's regulated gradients.
    """

    def __init__(self, theta: Theta, regulated: Theta) -> None:
        self.theta, self.regulated = theta, regulated


class MetaPrompts(nn.Module):
    """What the trainer trains: a learner's prompts and a regulator, on batches of episodes.

    Args:
        learner: Holds the prompts; its own classes don't matter.
        options: See :class:`MetaOptions`.

    Raises:
        DataError: If the learner has no prompts, or what it learns belongs to its classes or samples.
        UnknownNameError: For an unknown regulator.
        ConfigError: For options the regulator doesn't have.
    """

    def __init__(self, learner: Learner, options: MetaOptions) -> None:
        super().__init__()
        shapes = prompt_shapes(learner, PROMPTS)
        if not shapes or learner.class_bound or hasattr(learner, "solve") or hasattr(learner, "prepare"):
            raise DataError(
                f"{learner.method} has no prompts that tasks could share: nothing can be meta-learned. Use a learner "
                "of prompts (coop, vpt, upt, maple, ivlp, mvlpt ...)."
            )
        self.learner, self.options = learner, options
        self.regulator: Regulator = create_regulator(
            **{"dim": learner.backbone.dim, "shapes": shapes, **options.regulator}
        )
        self.mean: Theta = {}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outer losses, means over ``batch["episodes"]``."""
        episodes: Sequence[Episode] = batch["episodes"]
        total: dict[str, Tensor] = {}
        for episode in episodes:
            for name, value in self.episode_losses(episode).items():
                total[name] = total.get(name, torch.zeros_like(value)) + value / len(episodes)
        return total

    def episode_losses(self, episode: Episode) -> dict[str, Tensor]:
        """Return ``query``, and where they are asked for ``support`` and ``regulator``."""
        support, query = self._classifier(episode.support), self._classifier(episode.query)
        theta, situation = self.theta(), self._situation(episode.support)
        adapted = self.adapt(support, theta, episode.support.batch, situation)
        losses = {"query": query.loss(adapted.theta, self._moved(episode.query.batch))}
        if self.options.support_weight:
            own = support.loss(theta, self._moved(episode.support.batch))
            losses["support"] = self.options.support_weight * own
        if self.regulator.needs_features and torch.is_grad_enabled():
            names = list(adapted.theta)
            found = torch.autograd.grad(
                losses["query"], [adapted.theta[n] for n in names], retain_graph=True, allow_unused=True
            )
            pulls = {
                n: torch.zeros_like(theta[n]) if g is None else g for n, g in zip(names, found, strict=True)
            }
            extra = self.regulator.auxiliary(adapted.regulated, pulls, episode.similarity, situation)
            losses |= {} if extra is None else {"regulator": extra}
        return losses

    def adapt(
        self, classifier: Functional, theta: Theta, batch: Batch, situation: Situation, regulate: bool = True
    ) -> Adapted:
        """Take the inner steps.

        Args:
            classifier: Of the support's classes.
            theta: Where they start.
            batch: The support.
            situation: What the regulator knows; second gradients are added here if it needs them.
            regulate: False takes plain steps.
        """
        batch, again = self._moved(batch), self.options.second_order
        regulated: Theta = {}
        for _ in range(self.options.inner_steps):
            with torch.enable_grad(), _twice_differentiable(again):
                gradients = _gradients(classifier.loss(theta, batch), theta, again)
                if self.options.inner_clip:
                    gradients = _clipped(gradients, self.options.inner_clip)
                if regulate and self.regulator.needs_general:
                    far = classifier.at(theta, lambda learner: self.regulator.distance(learner, batch))
                    situation = Situation(situation.features, _gradients(far, theta, again))
            regulated = self.regulator(gradients, situation) if regulate else gradients
            theta = {n: t - self.options.inner_lr * regulated[n] for n, t in theta.items()}
        return Adapted(theta, regulated)

    def evaluate(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Return means over episodes of the query's accuracy and loss.

        ``accuracy`` and ``loss`` are behind the regulated step, ``plain_accuracy`` behind a plain one and
        ``unadapted_accuracy`` before any; ``zero_shot_accuracy`` is that of the written template.
        """
        theta = {n: t.detach().requires_grad_() for n, t in (self.mean or self.theta()).items()}
        rows = [self._scores(episode, theta) for episode in episodes]
        return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}

    def _scores(self, episode: Episode, theta: Theta) -> dict[str, float]:
        support, query = self._classifier(episode.support), self._classifier(episode.query)
        batch, situation = self._moved(episode.query.batch), self._situation(episode.support)
        steps = {
            "": self.adapt(support, theta, episode.support.batch, situation).theta,
            "plain_": self.adapt(support, theta, episode.support.batch, situation, regulate=False).theta,
            "unadapted_": theta,
        }
        with torch.no_grad():
            found = {f"{k}accuracy": _accuracy(query.logits(t, batch), batch) for k, t in steps.items()}
            found["loss"] = float(query.loss(steps[""], batch))
            backbone = self.learner.backbone
            weights = backbone.class_weights(episode.query.names, self.learner.templates)
            images = batch["embedding"] if "embedding" in batch else backbone.image_embeddings(batch["image"])
            found["zero_shot_accuracy"] = _accuracy(images @ weights.T, batch)
        return found

    def theta(self) -> Theta:
        """Return the prompts, and whatever else of the learner is learned, by name."""
        return {n: p for n, p in self.learner.named_parameters() if p.requires_grad}

    # --- what the trainer asks for beside losses (see Trainable)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the regulator a learning rate of its own and no weight decay."""
        names = [n for n, p in self.named_parameters() if p.requires_grad]
        phi = [n for n in names if n.startswith("regulator.")]
        groups = [{"names": [n for n in names if n not in phi]}]
        return (
            [*groups, {"names": phi, "rate": self.options.regulator_lr, "weight_decay": 0.0}]
            if phi
            else groups
        )

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut each group's gradient to norm 1, and let the running mean follow the prompts; once per outer step."""
        self._follow()
        clipped: dict[str, Tensor] = {}
        for kind in ("learner.", "regulator."):
            clipped |= _clipped({n: g for n, g in gradients.items() if n.startswith(kind)}, _CLIP)
        return clipped

    def _follow(self) -> None:
        decay = self.options.average
        for name, value in self.theta().items() if decay else ():
            held = self.mean.get(name, value.detach())
            self.mean[name] = held + (1 - decay) * (value.detach() - held)

    def after_training(self) -> None:
        """Put the running mean in the prompts' place."""
        if self.mean:
            self._follow()
            self.learner.load_trainable_state(self.mean)

    def running_state(self) -> dict[str, Tensor]:
        """Return the running mean."""
        return dict(self.mean)

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the running mean back."""
        self.mean = dict(state)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return prompts and regulator by name."""
        return {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put prompts and regulator back, strictly."""
        own = {n: p for n, p in self.named_parameters() if p.requires_grad}
        if wrong := [
            n for n in {*own, *state} if n not in own or n not in state or own[n].shape != state[n].shape
        ]:
            raise CheckpointError(
                f"this state does not fit the prompts and regulator: {', '.join(sorted(wrong))}."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def _classifier(self, side: Side) -> Functional:
        return Functional(self.learner.with_classes(side.names))

    def _situation(self, side: Side) -> Situation:
        if not self.regulator.needs_features:
            return Situation()
        return Situation(side.features.to(self.learner.backbone.device))

    def _moved(self, batch: Batch) -> Batch:
        return {k: v.to(self.learner.backbone.device) for k, v in batch.items()}


def _gradients(loss: Tensor, theta: Theta, again: bool) -> Theta:
    """Return the gradient by name; a constant unless it is differentiated ``again``."""
    if not loss.requires_grad:
        return {n: torch.zeros_like(t) for n, t in theta.items()}
    found = torch.autograd.grad(loss, list(theta.values()), create_graph=again, allow_unused=True)
    return {
        n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(theta.items(), found, strict=True)
    }


def _clipped(gradients: Mapping[str, Tensor], most: float) -> Theta:
    """Return gradients whose norm, all together, is at most ``most``."""
    norm = torch.stack([g.norm() for g in gradients.values()]).norm() if gradients else torch.ones(())
    return {n: g * (most / norm.clamp(min=most)) for n, g in gradients.items()}


@contextmanager
def _twice_differentiable(needed: bool) -> Iterator[None]:
    """Fused attention has no second derivative; the plain one has."""
    if not needed:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _accuracy(logits: Tensor, batch: Batch) -> float:
    return float((logits.argmax(1) == batch["label"]).float().mean())
