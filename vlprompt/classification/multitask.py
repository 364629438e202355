"""Several tasks, one set of prompts: MVLPT's source stage, for any learner whose prompts are not bound to classes.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 3.2. Differs from the
authors' code where that is wrong: a sample competes against its own task's classes exactly (their option multiplies
foreign logits by zero, which leaves exp(0) in the denominator), every epoch has its own order, and scores are
fractions for all tasks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.fit import RunResult, TrainingSource, parse_options, run_identity
from vlprompt.classification.gram import GramStart, regulated, start_learner
from vlprompt.classification.options import LabelSpace, MultiTaskOptions
from vlprompt.classification.task_batches import MultiTaskBatches
from vlprompt.core.errors import DataError
from vlprompt.core.names import check_classnames
from vlprompt.core.processes import accelerator
from vlprompt.data import Augmentation, FeatureCache, ImageDataset
from vlprompt.learners import Learner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.training.batches import Batch
from vlprompt.training.callbacks import Callback, default_callbacks
from vlprompt.training.trainer import Trainer

__all__ = [
    "MultiTask",
    "TaskData",
    "common_templates",
    "fit_multitask",
    "mean_over_tasks",
    "union_of_classes",
]

_HOOKS = ("combine_gradients", "after_epoch", "after_training", "running_state", "load_running_state")


@dataclass(frozen=True)
class TaskData:
    """One task's samples; validation samples are optional, and never test data."""

    train: ImageDataset
    val: ImageDataset | None = None


def union_of_classes(
    class_lists: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return all tasks' distinct class names, and for each task the places of its classes among them.

    Names that differ in upper and lower case alone, which CLIP's tokenizer can't tell apart, are one.

    Args:
        class_lists: The names of each task.
    """
    union: dict[str, int] = {}
    shown: list[str] = []
    places = []
    for names in class_lists:
        own = []
        for name in check_classnames(names, "a task"):
            key = name.casefold()
            if key not in union:
                union[key] = len(shown)
                shown.append(name)
            own.append(union[key])
        places.append(own)
    return tuple(shown), places


def common_templates(templates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the templates all tasks share, or "a photo of a {}." if they differ."""
    first = tuple(templates[0])
    return first if all(tuple(t) == first for t in templates) else DEFAULT_TEMPLATES


class MultiTask:
    """One classifier per task, all with the very parameters of one learner; what the trainer trains.

    Args:
        learner: Holds what is learned; its own classes don't matter.
        tasks: Task to its class names and templates.
        label_space: See :class:`MultiTaskOptions`.

    Raises:
        DataError: If what the learner learns is bound to its classes or samples; or if names repeat in a ``joint``
            label space that the learner's own loss can't keep apart.
    """

    def __init__(
        self,
        learner: Learner,
        tasks: Mapping[str, tuple[Sequence[str], Sequence[str]]],
        label_space: LabelSpace = "per_task",
    ) -> None:
        for hook in ("solve", "prepare"):
            if hasattr(learner, hook):
                raise DataError(
                    f"{learner.method} keeps one set of values per class or training sample, so several tasks can't "
                    "share them. Use a learner of prompts (mvlpt, coop, vpt, upt, maple ...)."
                )
        self.learner, self.label_space = learner, label_space
        self.tasks = {name: _tied(learner, *lists) for name, lists in tasks.items()}
        self.joint: Learner | None = None
        if label_space != "per_task":
            lists = [names for names, _ in tasks.values()]
            union, self._places = union_of_classes(lists)
            self.joint = _tied(learner, union, common_templates([t for _, t in tasks.values()]))
            # With equal names kept apart, a name's weight stands in as many columns as tasks have it.
            self._columns = [place for own in self._places for place in own]
            self._repeats = label_space == "joint" and len(set(self._columns)) < len(self._columns)
            if self._repeats and type(learner).loss is not Learner.loss:
                raise DataError(
                    f"{learner.method}'s own loss can't tell equal class names of different tasks apart. "
                    "Use label_space joint_dedup or per_task."
                )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named losses, means over the batch's samples.

        Args:
            batch: ``"task"`` (B,) task numbers, ``"label"`` (B,) labels inside the task, and ``"image"`` or
                ``"embedding"``. Only the class names of tasks that occur are encoded (``per_task``).
        """
        if type(self.learner).loss is Learner.loss and "image" in batch:
            # The image side doesn't know of tasks: one pass for all.
            rest = {k: v for k, v in batch.items() if k != "image"}
            batch = {**rest, "embedding": self.learner.embed_images(batch["image"])}
        if self.joint is not None:
            return self._joint_loss(self.joint, batch)
        learners = list(self.tasks.values())
        total: dict[str, Tensor] = {}
        for task in batch["task"].unique().tolist():
            rows = (batch["task"] == task).nonzero().squeeze(1)
            part = {k: v[rows] for k, v in batch.items() if k != "task"}
            share = len(rows) / len(batch["task"])
            for name, value in learners[task].loss(part).items():
                total[name] = total.get(name, torch.zeros_like(value)) + share * value
        return total

    def _joint_loss(self, joint: Learner, batch: Batch) -> dict[str, Tensor]:
        offsets = np.cumsum([0, *(len(own) for own in self._places)])
        pairs = list(zip(batch["task"].tolist(), batch["label"].tolist(), strict=True))
        part = {k: v for k, v in batch.items() if k not in ("task", "label")}
        if not self._repeats:
            label = torch.tensor([self._places[task][own] for task, own in pairs])
            return joint.loss({**part, "label": label.to(batch["label"].device)})
        label = torch.tensor([int(offsets[task]) + own for task, own in pairs])
        logits = joint.batch_logits(part)[:, self._columns]
        return {"cross_entropy": F.cross_entropy(logits, label.to(logits.device))}

    def evaluate(
        self, data: Mapping[str, ImageDataset], cache: FeatureCache | None = None
    ) -> dict[str, float]:
        """Return each task's metrics on its own classes as ``<task>/<metric>``, and their unweighted means."""
        by_task = {name: evaluate(self.tasks[name], part, cache=cache) for name, part in data.items()}
        numbers = mean_over_tasks(by_task)
        return numbers | {f"{name}/{k}": v for name, scores in by_task.items() for k, v in scores.items()}

    def trainable_state(self) -> dict[str, Tensor]:
        """See :meth:`Learner.trainable_state`."""
        return self.learner.trainable_state()

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Learner.load_trainable_state`; every task sees it."""
        self.learner.load_trainable_state(state)
        self.train(self.learner.training)  # forgets what was computed from the old values

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Return the learner's parameters."""
        return self.learner.named_parameters()

    def train(self, mode: bool = True) -> MultiTask:
        """See :meth:`Learner.train`."""
        for learner in (self.learner, *self.tasks.values(), *([self.joint] if self.joint else [])):
            learner.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        # What the trainer asks a learner for by its absence or presence (see Learner).
        if name in _HOOKS:
            return getattr(self.learner, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _tied(learner: Learner, classnames: Sequence[str], templates: Sequence[str]) -> Learner:
    """Return the learner for other classes with the same parameter objects, not copies of their values."""
    other = learner.with_classes(classnames, templates)
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            owner, _, last = name.rpartition(".")
            other.get_submodule(owner).register_parameter(last, parameter)
    return other.to(learner.backbone.device)


def mean_over_tasks(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the unweighted mean over tasks of every metric that all tasks have."""
    scores = list(by_task.values())
    return {
        k: float(np.mean([s[k] for s in scores])) for k in scores[0] if all(k in other for other in scores)
    }


def fit_multitask(
    learner: Learner,
    tasks: Mapping[str, TaskData],
    sharing: MultiTaskOptions | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    augmentation: str = "none",
    views: int = 1,
    cache_dir: str | Path | None = None,
    callbacks: Sequence[Callback] | None = None,
    **options: Any,
) -> tuple[RunResult, MultiTask]:
    """Train one learner on several tasks at once; its parameters are changed in place.

    Args:
        learner: Holds what is learned; for example made for :func:`union_of_classes`.
        tasks: Name to samples.
        sharing: See :class:`MultiTaskOptions`.
        folder: See :func:`vlprompt.fit`, also for the rest.
        resume: See there.
        augmentation: See there.
        views: See there.
        cache_dir: See there.
        callbacks: See there.
        **options: See :class:`TrainOptions`.

    Returns:
        The result (``val/<metric>`` are unweighted means over tasks, ``val/<task>/<metric>`` a task's own), and the
        tasks' classifiers.

    Raises:
        DataError: If the learner can't be shared, a task has no samples, or there is no task.
        VLPromptError: As :func:`vlprompt.fit`.
    """
    sharing, checked = sharing or MultiTaskOptions(), parse_options(options)
    tasks = _checked(tasks)
    started, processes = time.monotonic(), accelerator()
    learner.to(processes.device)
    lists = {name: (data.train.classnames, data.train.templates) for name, data in tasks.items()}
    start = start_learner(learner, checked.init)
    module = MultiTask(learner, lists, sharing.label_space)
    cache = FeatureCache(cache_dir)
    held_out = {name: data.val for name, data in tasks.items() if data.val is not None}
    history: list[dict[str, Any]] = []
    if checked.epochs and any(p.requires_grad for p in learner.parameters()):
        views_of = Augmentation.parse(augmentation)
        sources = [
            TrainingSource(learner, data.train, views_of, views, checked, cache) for data in tasks.values()
        ]
        sizes = [len(data.train) for data in tasks.values()]
        mixed = (checked.batch_size, checked.seed, checked.drop_last)
        path = None if folder is None else Path(folder)
        parts = {n: run_identity(module.tasks[n], d.train, augmentation, views) for n, d in tasks.items()}
        trainer = Trainer(
            regulated(learner, start, lambda: _embeddings(sources), checked.optimizer, module),
            MultiTaskBatches([source.batches() for source in sources], sizes, sharing.exponent, *mixed),
            checked,
            path,
            validate=(lambda: module.evaluate(held_out, cache)) if held_out else None,
            callbacks=default_callbacks(learner.method, path) if callbacks is None else callbacks,
            identity={"tasks": parts, "sharing": sharing.model_dump(mode="json")} | GramStart.identity(start),
            accelerator=processes,
        )
        history = trainer.run(resume).history
    module.train(False)
    metrics = {"seconds": time.monotonic() - started}
    if held_out:
        metrics |= {f"val/{k}": v for k, v in module.evaluate(held_out, cache).items()}
    return RunResult(metrics, history, None if folder is None else Path(folder), learner), module


def _embeddings(sources: Sequence[TrainingSource]) -> Tensor:
    """Return the (n, d) embeddings of all tasks' training samples, one view of each."""
    return torch.cat([source.training_data()[0][0] for source in sources])


def _checked(tasks: Mapping[str, TaskData]) -> dict[str, TaskData]:
    if not tasks:
        raise DataError("multitask training needs at least one data set.")
    if empty := [name for name, data in tasks.items() if not len(data.train)]:
        raise DataError(f"{empty[0]}: there are no training samples.")
    return {name: TaskData(data.train.one_label_each(), data.val) for name, data in tasks.items()}
