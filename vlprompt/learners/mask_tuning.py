"""Mask tuning: learn which weights of the image tower to switch off for a task.

Paper: Zheng et al., "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    ICCV 2023, arXiv 2307.15049.

Where this differs from the published code: without regularity, that code never takes a step; its gate drops agreeing
gradients when both are small (see :func:`agreement`); it masks the patch embedding in "attention" mode (here
``patch``); and it has no masks of MLPs alone. Initial scores are constant; its uniform start is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.reweighted import ReweightedBackbone
from vlprompt.backbones.vision import Images
from vlprompt.core.errors import CheckpointError, ConfigError
from vlprompt.core.options import options_model
from vlprompt.core.seeding import derive_seed
from vlprompt.core.trainable import misfits
from vlprompt.learners import LEARNERS, create_learner
from vlprompt.learners._masks import (
    Group,
    Importance,
    Select,
    choose,
    gradient_dropout,
    group_of,
    importance,
    mean_importance,
)
from vlprompt.learners._scores import MaskScores
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.hooks import TrainingSamples, overridden_hooks
from vlprompt.learners.recipe import Recipe

__all__ = ["MaskTuning"]

log = logging.getLogger("vlprompt.learners")


class MaskTuning(Learner):
    """One bit per weight: 1[score > threshold]; scores are learned straight through the step, all bits start at 1.

    The regularised forms compute a second loss, ``kl`` from zero-shot predictions, which only steers: elements of
    the task's gradient that disagree with its gradient are dropped at random (:func:`gradient_dropout`). That takes
    the trainer, which calls :meth:`combine_gradients`. Train with Adam (``optimizer: adamw, weight_decay: 0``): a
    weight is switched off after at least (init - threshold) / lr steps against it.

    With ``prompts``, another learner's parameters are trained together with the masks, at the one rate of the
    trainer; since Adam doesn't see scale, ``init`` and ``threshold`` times s make the masks learn at rate / s.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights, of the classifier and of the frozen model that steers.
        tensors: Shell patterns of weights' names inside the image tower; empty: all of the group.
        patch: Mask the patch embedding too, as the published code does.
        select: Of these, which: ``all``, or by the size of their gradients on the training data before the first
            step: kinds of weights (``type``), or single weights (``layer``, ``top``); see :func:`choose`.
        select_share: For ``layer``, share of the largest importance that is enough.
        select_count: For ``top``, number of weights.
        init: Score that every bit starts from.
        threshold: At most this score switches a weight off.
        norm_weight: Of the sum over tensors of |scores|_2; with Adam it can switch off what the task ignores.
        gdr_lambda: By how much dropped elements shrink: 1 drops them, 0 is no regularity. None: 1 in the regularised
            forms, 0 in the others. (The paper: 0.3 at 16 shots on all but its three largest data sets.)
        temperature: Divides both logits in ``kl``.
        prompts: The learner whose classifier looks through the masked tower.
        prompt_options: Its options.
        seed: Of gradient dropout, and of the prompts' start.

    Raises:
        BackboneError: If ``prompts`` can't work on this backbone.
        ConfigError: If the image tower has no such weights, or ``prompts`` can't be combined with masks.
    """

    recipe = Recipe(
        {
            "lr": 8e-5,
            "batch_size": 32,
            "epochs": 30,
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "warmup_epochs": 0.0,
        },
        factors=(1.0, 5.0, 25.0),
        steps=100,
        trial_steps=40,
    )

    static_images = False
    smooth = False
    combines_gradients = True
    statistics: Tensor  # updates; sums over them of the shares of dropped elements and of the penalty
    group: ClassVar[Group]
    regularised: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        tensors: tuple[str, ...] = (),
        patch: bool = False,
        select: Select = "all",
        select_share: Annotated[float, Field(gt=0, le=1)] = 0.5,
        select_count: Annotated[int, Field(ge=1)] = 12,
        init: Annotated[float, Field(gt=0)] = 0.01,
        threshold: Annotated[float, Field(gt=0)] = 0.005,
        norm_weight: Annotated[float, Field(ge=0)] = 1e-4,
        gdr_lambda: Annotated[float | None, Field(ge=0, le=1)] = None,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        prompts: str = "zero_shot",
        prompt_options: dict[str, Any] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        if threshold >= init:
            raise ConfigError([f"threshold: {threshold} must be below init, {init}."], "mask tuning")

        self.threshold = threshold
        self.norm_weight = norm_weight
        self.temperature = temperature
        self.seed = seed
        self.gdr_lambda = float(self.regularised) if gdr_lambda is None else gdr_lambda
        self.reads_frozen = self.gdr_lambda > 0
        self.selection = (select, select_share, select_count)

        self.kinds = group_of(backbone, self.group, patch, tensors)
        self.importance: dict[str, Importance] = {}
        frozen = {name: backbone.vision.visual.get_parameter(name) for name in self.kinds}
        self.scores = MaskScores(frozen, init, threshold)

        view = ReweightedBackbone(backbone, self.scores.use())
        self.prompts = _combined(prompts, view, self.classnames, self.templates, prompt_options or {}, seed)
        self.plain = prompts == "zero_shot"
        self.class_bound = self.prompts.class_bound

        self.register_buffer("statistics", torch.zeros(3), persistent=False)
        self._zero_shot: Tensor | None = None

    # --- the classifier

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: what lies below the first weight that is or may be switched off."""
        tower = self.backbone.vision
        blocks = [tower.block_of(name) for name in self.kinds if not self.scores.is_fixed(name)]
        if None in blocks or not blocks:
            return 0

        masked = 1 + min(block for block in blocks if block is not None)
        return masked if self.prompts.static_images else min(masked, self.prompts.frozen_stages())

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        return self.prompts.embed_images(images)  # type: ignore[arg-type]  # states only where it reads them

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self.prompts.class_embeddings()

    def logits(self, embeddings: Tensor) -> Tensor:
        """See :meth:`Learner.logits`."""
        return self.prompts.logits(embeddings)

    def masks(self) -> dict[str, Tensor]:
        """Return the boolean mask of every weight of the group by its name in the image tower; False is off."""
        return self.scores.masks()

    # --- training

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``cross_entropy``, ``norm_penalty`` if it has a weight, and ``kl`` if it steers.

        ``kl`` = T^2 KL(p0 || p), a mean over the batch. It is left out while no weight is switched off: then both
        models are the same, and so is the step.
        """
        if self.training and self.needs_survey and not self.importance:
            raise ConfigError(
                [f"select: {self.selection[0]} looks at the training data, which only fit shows."],
                "mask tuning",
            )

        logits = self.logits(self.embed_images(batch["image"]))
        losses: dict[str, Tensor] = {}

        if self.norm_weight:
            learned = [score for score in self.scores.values() if score.requires_grad]
            losses["norm_penalty"] = self.norm_weight * torch.stack([score.norm() for score in learned]).sum()

        if self.gdr_lambda:
            self.zero_shot_weights()  # here, because they are computed once and belong to no graph
        # A traced graph can't ask; with all weights on the divergence is 0, and so is its gradient.
        is_same = not torch.compiler.is_compiling() and self.plain and self.scores.all_on()
        if self.gdr_lambda and not is_same:
            student = (logits.float() / self.temperature).log_softmax(-1)
            teacher = (self._teacher_logits(batch) / self.temperature).log_softmax(-1)
            divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            losses["kl"] = self.temperature**2 * divergence

        # Last: the graph is freed on the way through the backward pass of the last loss.
        losses["cross_entropy"] = F.cross_entropy(logits, batch["label"])
        return losses

    @property
    def needs_survey(self) -> bool:
        """Whether the training data decide which weights get a mask."""
        return self.selection[0] != "all"

    def survey(self, sources: Sequence[TrainingSamples]) -> None:
        """Choose which weights get a mask, by the mean importance over tasks; see :func:`choose`."""
        self.statistics.zero_()
        if not self.needs_survey:
            return

        by_task = []
        for source in sources:
            weights = source.learner.zero_shot_weights()
            by_task.append(importance(self.backbone, weights, self._labelled(source), self.kinds))
        importances = mean_importance(by_task)

        for classifier in (self, *(source.learner for source in sources)):
            classifier.importance = importances

        how, share, count = self.selection
        chosen = choose(importances, self.kinds, how, share, count)
        for name in self.kinds:
            self.scores.of(name).requires_grad_(name in chosen)
        log.info("masks on %d of %d weights: %s", len(chosen), len(self.kinds), ", ".join(chosen))

    def combine_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """See :meth:`Hooks.combine_gradients`.

        Draws depend on the seed and the number of the update alone, so every process of a run draws the same.
        """
        names = list(self.learned_parameters())
        task = gradients["cross_entropy"]
        norm = gradients.get("norm_penalty")
        general = gradients.get("kl")

        generator = torch.Generator(task[0].device)
        generator.manual_seed(derive_seed(self.seed, "gradient dropout", int(self.statistics[0])))

        combined = []
        count = 0
        size, penalty, dropped = self.statistics.new_zeros(3)
        for i, name in enumerate(names):
            gradient = task[i]
            if name.startswith("scores."):  # the prompts' gradients stay as they are
                count += gradient.numel()
                size = size + gradient.abs().sum()
                if norm is not None:
                    penalty = penalty + norm[i].abs().sum()
                    gradient = gradient + norm[i]
                if general is not None:
                    gated = gradient_dropout(gradient, general[i], self.gdr_lambda, generator)
                    dropped = dropped + (gated != gradient).sum()
                    gradient = gated
            combined.append(gradient)

        tiny = torch.finfo(size.dtype).tiny
        shares = [torch.ones_like(size), dropped / count, penalty / (size + penalty).clamp(min=tiny)]
        self.statistics += torch.stack(shares)
        return combined

    def after_training(self) -> None:
        """Warn if nothing was switched off."""
        if self.scores.all_on():
            log.warning(
                "%s: no weight was switched off. Steps times rate must exceed init - threshold = %.3g: raise train.lr "
                "or train.epochs.",
                self.method,
                self.scores.init - self.threshold,
            )

    def figures(self) -> dict[str, float]:
        """Return shares: weights switched off, dropped gradient elements, and the penalty's part in the gradient."""
        masks = self.masks().values()
        off = sum(int((~mask).sum()) for mask in masks)
        count = sum(mask.numel() for mask in masks)

        updates, dropped, penalty = self.statistics.tolist()
        updates = max(updates, 1.0)
        return {
            "masked_share": off / count,
            "dropped_gradient_share": dropped / updates,
            "norm_gradient_share": penalty / updates,
        }

    # --- state

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the masks, 8 weights to a byte, and the prompts' parameters; scores are only the trainer's."""
        parts = {"scores": self.scores.packed(), "prompts": self.prompts.trainable_state()}
        return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put masks and prompts back; scores become ``init`` where a mask is on, 0 where it is off.

        Raises:
            CheckpointError: If a tensor is missing, unknown or of another shape or type; each is named.
        """
        problems = misfits(self.trainable_state(), state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.method}: {'; '.join(problems)}.")

        self.scores.load_packed(_below("scores", state))
        self.prompts.load_trainable_state(_below("prompts", state))

    def running_state(self) -> dict[str, Tensor]:
        """Return the scores themselves, for a checkpoint."""
        scores = {f"scores.{key}": score.detach() for key, score in self.scores.items()}
        return {**scores, "statistics": self.statistics}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's scores."""
        self.scores.load_scores(_below("scores", state))
        self.statistics.copy_(state["statistics"])

    # --- the frozen model

    def zero_shot_weights(self) -> Tensor:
        """Return (C, d) class weights of the hand-written sentences; computed once."""
        if self._zero_shot is None:
            self._zero_shot = self.backbone.class_weights(self.classnames, self.templates)
        return self._zero_shot

    def _teacher_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (B, C) logits of the frozen model with hand-written sentences."""
        embeddings = batch.get("frozen")
        if embeddings is None:
            embeddings = self.backbone.image_embeddings(batch["image"])
        return self.backbone.logit_scale * F.normalize(embeddings, dim=-1) @ self.zero_shot_weights().T

    def _labelled(self, source: TrainingSamples) -> Iterator[dict[str, Tensor]]:
        """Yield the first epoch's batches with labels among the classes of the source's classifier."""
        for batch in source.first_epoch():
            moved = {name: value.to(self.backbone.device) for name, value in batch.items()}
            moved["label"] = source.positions.to(self.backbone.device)[moved["label"]]
            yield moved


def _below(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``part.``, without it."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _combined(
    name: str,
    view: ReweightedBackbone,
    classnames: Sequence[str],
    templates: Sequence[str],
    options: Mapping[str, Any],
    seed: int,
) -> Learner:
    """Build the learner that looks through the masked tower.

    Raises:
        ConfigError: If training it takes more than the cross entropy of its logits.
    """
    target = LEARNERS.get(name).target

    hooks = overridden_hooks(target)
    if hooks or target.loss is not Learner.loss:
        reason = hooks[0] if hooks else "a loss"
        raise ConfigError(
            [
                f"prompts: {name} can't be trained together with masks: it has {reason} of its own. "
                "Train masks alone, then the learner on the backbone with these masks (backbone.masks=PATH)."
            ],
            "mask tuning",
        )

    if "seed" in options_model(target).model_fields:
        options = {"seed": seed, **options}
    return create_learner(name, view, classnames, templates, **options)


@LEARNERS.register("amt", summary="binary masks on the image tower's attention", paper="2307.15049")
class AMT(MaskTuning):
    """Attention mask tuning: masks on the projections of attention; options as in :class:`MaskTuning`."""

    group = "attention"


@LEARNERS.register("mmt", summary="binary masks on the image tower's MLPs", paper="2307.15049")
class MMT(MaskTuning):
    """MLP mask tuning; on a ResNet the residual layers' convolutions; options as in :class:`MaskTuning`."""

    group = "mlp"


@LEARNERS.register("pmt", summary="binary masks on all of the image tower's weights", paper="2307.15049")
class PMT(MaskTuning):
    """Parameter mask tuning: every matrix and filter; options as in :class:`MaskTuning`."""

    group = "all"


@LEARNERS.register(
    "ramt", summary="attention masks, updates gated by zero-shot", paper="2307.15049", needs=("teacher",)
)
class RAMT(AMT):
    """AMT with gradient dropout regularity; options as in :class:`MaskTuning`."""

    regularised = True


@LEARNERS.register(
    "rmmt", summary="MLP masks, updates gated by zero-shot", paper="2307.15049", needs=("teacher",)
)
class RMMT(MMT):
    """MMT with gradient dropout regularity; options as in :class:`MaskTuning`."""

    regularised = True


@LEARNERS.register(
    "rpmt", summary="masks on all weights, updates gated by zero-shot", paper="2307.15049", needs=("teacher",)
)
class RPMT(PMT):
    """PMT with gradient dropout regularity; options as in :class:`MaskTuning`."""

    regularised = True
