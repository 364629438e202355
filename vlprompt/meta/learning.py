"""The two-level problem: prompts and regulator such that one regulated step on a domain helps on another.

    inner   theta' = theta - alpha R_phi(g),  g = grad L_support(theta)
    outer   min over theta, phi of the mean over episodes of L_query(theta')

First order, the default, takes g as a constant: theta gets the query's gradient at theta' (Finn et al., ICML 2017,
section 5.2), phi its exact gradient -alpha (dR/dphi)^T grad L_query(theta'), so that the regulator learns to keep what
also helps in a domain it did not see. That prompts and regulator are learned together is the paper's claim; sizes,
optimiser and the first-order step are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.core.errors import DataError
from vlprompt.core.trainable import Batch, ParameterGroup, Trainable, Wrapper
from vlprompt.learners import Learner
from vlprompt.meta.episodes import Episode, Side
from vlprompt.meta.functional import Functional, prompt_shapes
from vlprompt.meta.options import MetaOptions
from vlprompt.meta.regulators import PROMPTS, Regulator, Situation, create_regulator

__all__ = ["Adapted", "MetaPrompts"]

log = logging.getLogger("vlprompt.meta")

Theta = dict[str, Tensor]
_CLIP = 1.0  # largest norm of the prompts' outer gradient, and of the regulator's
_MEAN = "mean."  # prefixes of names in a checkpoint
_LEARNER = "learner."


class Adapted:
    """What the inner steps return.

    Attributes:
        theta: The prompts after them.
        regulated: The last step's regulated gradients.
    """

    def __init__(self, theta: Theta, regulated: Theta) -> None:
        self.theta = theta
        self.regulated = regulated


class MetaPrompts(nn.Module, Wrapper):
    """What the trainer trains: a learner's prompts and a regulator, on batches of episodes.

    The learner's hooks are called as in any other training, with one exception: the outer step's losses are the
    query's, not the learner's, so a learner that combines the gradients of its losses (ProGrad) has them added.

    Args:
        learner: Holds the prompts; its classes don't matter.
        options: See :class:`MetaOptions`.

    Raises:
        DataError: If the learner has no prompts, if what it learns belongs to its classes or samples, or if it must
            see labelled training data first.
        UnknownNameError: For an unknown regulator.
        ConfigError: For options the regulator doesn't have.
    """

    combines_gradients = False
    divides_classes = False  # every episode names its own classes

    def __init__(self, learner: Learner, options: MetaOptions) -> None:
        super().__init__()
        shapes = prompt_shapes(learner, PROMPTS)
        if not shapes or learner.class_bound or learner.solves or learner.prepares:
            raise DataError(
                f"{learner.method} has no prompts that tasks could share: nothing can be meta-learned. Use a learner "
                "of prompts (coop, vpt, upt, maple, ivlp, mvlpt ...)."
            )
        if learner.needs_survey or learner.reads:
            raise DataError(
                f"{learner.method} must look at labelled training images first, and captioned pairs are none. Use a "
                "learner of prompts (coop, vpt, upt, maple, ivlp, mvlpt ...)."
            )
        measured = set(learner.trainable_state()) - {name for name, _ in learner.named_parameters()}
        if measured:
            raise DataError(
                f"{learner.title()} keeps what it measures on a data set, which tasks can't share: "
                f"{', '.join(sorted(measured))}."
            )
        if learner.phases():
            raise DataError(f"{learner.title()} is trained in phases, which an episode has none of.")
        if learner.combines_gradients:
            log.warning(
                "%s combines the gradients of its losses; meta-training adds its losses up.", learner.method
            )

        self.learner = learner
        self.options = options
        self.regulator: Regulator = create_regulator(
            **{"dim": learner.backbone.dim, "shapes": shapes, **options.regulator}
        )
        self.mean: Theta = {}  # running mean of the prompts

    @property
    def wrapped(self) -> Trainable:
        """See :attr:`Wrapper.wrapped`."""
        return self.learner

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
        support = self._classifier(episode.support)
        query = self._classifier(episode.query)
        theta = self.theta()
        situation = self._situation(episode.support)

        adapted = self.adapt(support, theta, episode.support.batch, situation)
        losses = {"query": query.loss(adapted.theta, self._moved(episode.query.batch))}

        if self.options.support_weight:
            support_loss = support.loss(theta, self._moved(episode.support.batch))
            losses["support"] = self.options.support_weight * support_loss

        if self.regulator.needs_features and torch.is_grad_enabled():
            pulls = _gradients(losses["query"], adapted.theta, again=False, retain=True)
            extra = self.regulator.auxiliary(adapted.regulated, pulls, episode.similarity, situation)
            if extra is not None:
                losses["regulator"] = extra

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
        batch = self._moved(batch)
        again = self.options.second_order

        regulated: Theta = {}
        for _ in range(self.options.inner_steps):
            with torch.enable_grad(), _twice_differentiable(again):
                gradients = _gradients(classifier.loss(theta, batch), theta, again)
                if self.options.inner_clip:
                    gradients = _clipped(gradients, self.options.inner_clip)
                if regulate and self.regulator.needs_general:
                    distance = classifier.at(theta, lambda learner: self.regulator.distance(learner, batch))
                    situation = Situation(situation.features, _gradients(distance, theta, again))

            regulated = self.regulator(gradients, situation) if regulate else gradients
            theta = {name: t - self.options.inner_lr * regulated[name] for name, t in theta.items()}

        return Adapted(theta, regulated)

    def evaluate(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Return means over episodes of the query's accuracy and loss.

        ``accuracy`` and ``loss`` are behind the regulated step, ``plain_accuracy`` behind a plain one and
        ``unadapted_accuracy`` before any; ``zero_shot_accuracy`` is that of the written template.
        """
        prompts = self.mean or self.theta()
        theta = {name: tensor.detach().requires_grad_() for name, tensor in prompts.items()}

        rows = [self._scores(episode, theta) for episode in episodes]
        return {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}

    def _scores(self, episode: Episode, theta: Theta) -> dict[str, float]:
        """Return the metrics of one episode, see :meth:`evaluate`."""
        support = self._classifier(episode.support)
        query = self._classifier(episode.query)
        batch = self._moved(episode.query.batch)
        situation = self._situation(episode.support)

        adapted = {
            "": self.adapt(support, theta, episode.support.batch, situation).theta,
            "plain_": self.adapt(support, theta, episode.support.batch, situation, regulate=False).theta,
            "unadapted_": theta,
        }

        with torch.no_grad():
            scores = {
                f"{kind}accuracy": _accuracy(query.logits(prompts, batch), batch)
                for kind, prompts in adapted.items()
            }
            scores["loss"] = float(query.loss(adapted[""], batch))

            backbone = self.learner.backbone
            weights = backbone.class_weights(episode.query.names, self.learner.templates)
            images = batch["embedding"] if "embedding" in batch else backbone.image_embeddings(batch["image"])
            scores["zero_shot_accuracy"] = _accuracy(images @ weights.T, batch)

        return scores

    def theta(self) -> Theta:
        """Return the prompts, and whatever else of the learner is learned, by name."""
        return dict(self.learner.learned_parameters())

    def title(self) -> str:
        """See :meth:`Trainable.title`."""
        return "the prompts and regulator"

    # --- hooks

    def parameter_groups(self) -> list[ParameterGroup]:
        """Give the regulator a different learning rate and no weight decay; the learner's groups stay as they are."""
        own = self.learner.parameter_groups() or [{"names": list(self.learner.learned_parameters())}]
        groups: list[ParameterGroup] = [
            {**group, "names": [f"learner.{name}" for name in group["names"]]} for group in own
        ]

        regulator = [name for name in self.learned_parameters() if name.startswith("regulator.")]
        if regulator:
            groups.append({"names": regulator, "rate": self.options.regulator_lr, "weight_decay": 0.0})
        return groups

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut each group's gradient to norm 1, and let the running mean follow the prompts; once per outer step."""
        self._follow()

        clipped: dict[str, Tensor] = {}
        for kind in ("learner.", "regulator."):
            clipped |= _clipped({n: g for n, g in gradients.items() if n.startswith(kind)}, _CLIP)
        return clipped

    def after_training(self) -> None:
        """Put the running mean in the place of the prompts; without one, what the learner itself averages."""
        self.learner.after_training()
        if self.mean:
            self._follow()
            self.learner.load_trainable_state(self.mean)

    def running_state(self) -> dict[str, Tensor]:
        """Return the running mean, and what the learner needs to continue."""
        state = {f"{_MEAN}{name}": tensor for name, tensor in self.mean.items()}
        state |= {f"{_LEARNER}{name}": tensor for name, tensor in self.learner.running_state().items()}
        return state

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`running_state` returned."""
        self.mean = _below(_MEAN, state)
        self.learner.load_running_state(_below(_LEARNER, state))

    def _follow(self) -> None:
        """Move the running mean towards the present prompts."""
        decay = self.options.average
        if not decay:
            return
        for name, value in self.theta().items():
            mean = self.mean.get(name, value.detach())
            self.mean[name] = mean + (1 - decay) * (value.detach() - mean)

    # --- parts of an episode

    def _classifier(self, side: Side) -> Functional:
        return Functional(self.learner.with_classes(side.names))

    def _situation(self, side: Side) -> Situation:
        if not self.regulator.needs_features:
            return Situation()
        return Situation(side.features.to(self.learner.backbone.device))

    def _moved(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.learner.backbone.device) for name, tensor in batch.items()}


def _below(prefix: str, state: Mapping[str, Tensor]) -> Theta:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _gradients(loss: Tensor, theta: Theta, again: bool, retain: bool = False) -> Theta:
    """Return the gradient by name, zero where ``theta`` doesn't enter.

    Args:
        loss: A scalar.
        theta: What it is differentiated by.
        again: The gradient is differentiated again; otherwise it is a constant.
        retain: The loss is differentiated again.
    """
    if not loss.requires_grad:
        return {name: torch.zeros_like(tensor) for name, tensor in theta.items()}

    gradients = torch.autograd.grad(
        loss, list(theta.values()), create_graph=again, retain_graph=again or retain, allow_unused=True
    )
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(theta.items(), gradients, strict=True)
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
