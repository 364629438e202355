"""Several tasks, one set of prompts: MVLPT's source stage, for any learner whose prompts are not bound to classes.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 3.2. Differs from the
authors' code where that is wrong: a sample competes against its own task's classes exactly (their option multiplies
foreign logits by zero, which leaves exp(0) in the denominator), every epoch has its own order, and scores are
fractions for all tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.fit import (
    RunResult,
    calibrate,
    describe,
    parse_options,
    run_identity,
    validation,
)
from vlprompt.classification.options import LabelSpace, MultiTaskOptions
from vlprompt.classification.sources import TrainingSource, ValidationSource
from vlprompt.classification.task_batches import MultiTaskBatches
from vlprompt.core.errors import DataError
from vlprompt.core.names import check_classnames, check_templates
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator
from vlprompt.core.trainable import Trainable, TransparentWrapper
from vlprompt.data import PREFIX_GIB, Augmentation, FeatureCache, ImageDataset
from vlprompt.learners import Learner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.meta.regulated import regulated
from vlprompt.meta.start import GramStart, start_learner
from vlprompt.training.batches import Batch
from vlprompt.training.callback_lists import default_callbacks
from vlprompt.training.callbacks import Callback, check_callbacks
from vlprompt.training.options import TrainOptions, check_resume
from vlprompt.training.trainer import Trainer

__all__ = [
    "MultiTask",
    "TaskData",
    "common_templates",
    "fit_multitask",
    "mean_over_tasks",
    "union_of_classes",
]


@dataclass(frozen=True)
class TaskData:
    """One task's samples; validation samples are optional, and never test data."""

    train: ImageDataset
    val: ImageDataset | None = None


def union_of_classes(
    class_lists: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return all tasks' distinct class names, and for each task the positions of its classes among them.

    Names that differ in upper and lower case alone, which CLIP's tokenizer can't tell apart, are one.

    Args:
        class_lists: The names of each task.
    """
    union: list[str] = []
    position_of: dict[str, int] = {}
    positions = []

    for names in class_lists:
        task_positions = []
        for name in check_classnames(names, "a task"):
            key = name.casefold()
            if key not in position_of:
                position_of[key] = len(union)
                union.append(name)
            task_positions.append(position_of[key])
        positions.append(task_positions)

    return tuple(union), positions


def common_templates(templates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the templates all tasks share, or "a photo of a {}." if they differ."""
    first = check_templates(templates[0])
    return first if all(check_templates(t) == first for t in templates) else DEFAULT_TEMPLATES


class MultiTask(TransparentWrapper):
    """One classifier per task, all with the very parameters of one learner; what the trainer trains.

    Args:
        learner: Holds what is learned; its classes don't matter.
        tasks: Task to its class names and templates.
        label_space: See :class:`MultiTaskOptions`.

    Attributes:
        tasks: Each task's classifier.
        joint: The classifier of all tasks' classes; None in the label space ``per_task``.

    Raises:
        DataError: If what the learner learns is bound to its classes or samples; or if names repeat in a ``joint``
            label space and the learner has a loss that can't keep them apart.
    """

    divides_classes = False  # which tasks are encoded depends on the samples

    def __init__(
        self,
        learner: Learner,
        tasks: Mapping[str, tuple[Sequence[str], Sequence[str]]],
        label_space: LabelSpace = "per_task",
    ) -> None:
        if learner.solves or learner.prepares or learner.head_bound:
            raise DataError(
                f"{learner.method} keeps one set of values per class or training sample, so several tasks can't "
                "share them. Use a learner of prompts (mvlpt, coop, vpt, upt, maple ...)."
            )

        self.learner = learner
        self.label_space = label_space
        self.tasks = {name: _tied(learner, *lists) for name, lists in tasks.items()}
        self.joint: Learner | None = None
        self._positions: list[list[int]] = []  # of each task's classes among those of the joint classifier
        if label_space == "per_task":
            return

        union, self._positions = union_of_classes([names for names, _ in tasks.values()])
        templates = common_templates([task_templates for _, task_templates in tasks.values()])
        self.joint = _tied(learner, union, templates)

        # With equal names kept apart, a name's weight stands in as many columns as tasks have it.
        self._columns = [position for positions in self._positions for position in positions]
        self._repeats = label_space == "joint" and len(set(self._columns)) < len(self._columns)
        if self._repeats and type(learner).loss is not Learner.loss:
            raise DataError(
                f"{learner.method}'s own loss can't tell equal class names of different tasks apart. "
                "Use label_space joint_dedup or per_task."
            )

    @property
    def wrapped(self) -> Trainable:
        """See :attr:`Wrapper.wrapped`."""
        return self.learner

    def classifier(self, task: str) -> tuple[Learner, tuple[int, ...]]:
        """Return the classifier whose loss a task's samples enter, and where it has the task's classes.

        The positions are empty if the classifier has the task's classes and no others.
        """
        if self.joint is None:
            return self.tasks[task], ()
        return self.joint, tuple(self._positions[list(self.tasks).index(task)])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named losses, means over the batch's samples.

        Args:
            batch: ``"task"`` (B,) task numbers, ``"label"`` (B,) labels inside the task, and ``"image"`` or
                ``"embedding"``. Only the class names of tasks that occur are encoded (``per_task``).
        """
        if type(self.learner).loss is Learner.loss and "image" in batch:
            # The image side doesn't know of tasks: one pass for all.
            rest = {name: value for name, value in batch.items() if name != "image"}
            batch = {**rest, "embedding": self.learner.embed_images(batch["image"])}

        if self.joint is not None:
            return self._joint_loss(self.joint, batch)

        learners = list(self.tasks.values())
        total: dict[str, Tensor] = {}

        for task in batch["task"].unique().tolist():
            rows = (batch["task"] == task).nonzero().squeeze(1)
            part = {name: value[rows] for name, value in batch.items() if name != "task"}
            share = len(rows) / len(batch["task"])

            for name, value in learners[task].loss(part).items():
                total[name] = total.get(name, torch.zeros_like(value)) + share * value

        return total

    def _joint_loss(self, joint: Learner, batch: Batch) -> dict[str, Tensor]:
        """Return the losses over the classes of all tasks together."""
        labelled = list(zip(batch["task"].tolist(), batch["label"].tolist(), strict=True))
        part = {name: value for name, value in batch.items() if name not in ("task", "label")}

        if not self._repeats:
            label = torch.tensor([self._positions[task][number] for task, number in labelled])
            return joint.loss({**part, "label": label.to(batch["label"].device)})

        offsets = np.cumsum([0, *(len(positions) for positions in self._positions)])
        label = torch.tensor([int(offsets[task]) + number for task, number in labelled])
        logits = joint.batch_logits(part)[:, self._columns]
        return {"cross_entropy": F.cross_entropy(logits, label.to(logits.device))}

    def evaluate(
        self, data: Mapping[str, ImageDataset], cache: FeatureCache | None = None
    ) -> dict[str, float]:
        """Return each task's metrics on its own classes as ``<task>/<metric>``, and their unweighted means."""
        by_task = {name: evaluate(self.tasks[name], part, cache=cache) for name, part in data.items()}

        numbers = mean_over_tasks(by_task)
        for task, scores in by_task.items():
            numbers |= {f"{task}/{metric}": value for metric, value in scores.items()}
        return numbers

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`Trainable.load_trainable_state`; every task sees it."""
        self.learner.load_trainable_state(state)
        self.train(self.learner.training)  # forgets what was computed from the old values

    def train(self, mode: bool = True) -> MultiTask:
        """See :meth:`Learner.train`."""
        for learner in (self.learner, *self.tasks.values(), *([self.joint] if self.joint else [])):
            learner.train(mode)
        return self


def _tied(learner: Learner, classnames: Sequence[str], templates: Sequence[str]) -> Learner:
    """Return the learner for other classes with the same tensors, not copies of their values.

    Tied are the learned parameters, and the buffers that belong to the learned state (what a hook has measured).
    """
    other = learner.with_classes(classnames, templates)

    for name, parameter in learner.learned_parameters().items():
        owner, _, attribute = name.rpartition(".")
        other.get_submodule(owner).register_parameter(attribute, parameter)

    state = learner.trainable_state()
    for name, buffer in learner.named_buffers():
        if name in state:
            owner, _, attribute = name.rpartition(".")
            other.get_submodule(owner).register_buffer(attribute, buffer)

    return other.to(learner.backbone.device)


def mean_over_tasks(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the unweighted mean over tasks of every metric that all tasks have."""
    scores = list(by_task.values())
    shared = [metric for metric in scores[0] if all(metric in other for other in scores)]
    return {metric: float(np.mean([task[metric] for task in scores])) for metric in shared}


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
    prefix_gib: float = PREFIX_GIB,
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
        prefix_gib: See there.
        callbacks: See there.
        **options: See :class:`TrainOptions`.

    Returns:
        The result (``val/<metric>`` are unweighted means over tasks, ``val/<task>/<metric>`` a task's own), and the
        tasks' classifiers.

    Raises:
        DataError: If the learner can't be shared, a task has no samples, or there is no task.
        VLPromptError: As :func:`vlprompt.fit`.
    """
    sharing = sharing or MultiTaskOptions()
    checked = parse_options(options)
    check_resume(folder, resume)
    check_callbacks(callbacks)
    tasks = _checked(tasks)
    checked = checked.for_shots([(n, label) for n, data in tasks.items() for label in data.train.labels])
    started = time.monotonic()
    processes = accelerator()
    learner.to(learner.backbone.device_or(processes.device))
    folder = None if folder is None else user_path(folder)
    cache = FeatureCache(cache_dir, prefix_gib=prefix_gib)

    learner.enter_folder(folder, resume)
    start = start_learner(learner, checked.init)
    lists = {name: (data.train.classnames, data.train.templates) for name, data in tasks.items()}
    module = MultiTask(learner, lists, sharing.label_space)

    sources = _sources(module, tasks, Augmentation.parse(augmentation), views, checked, cache)
    learner.survey(sources)

    held_out = {name: data.val for name, data in tasks.items() if data.val is not None}
    history: list[dict[str, Any]] = []
    if checked.epochs and learner.learned_parameters():
        parts = {n: run_identity(module.tasks[n], d.train, augmentation, views) for n, d in tasks.items()}
        trainer = Trainer(
            regulated(learner, start, lambda: _embeddings(sources), checked.optimizer, module),
            _batches(sources, sharing.exponent, checked),
            checked,
            folder,
            validate=(lambda: module.evaluate(held_out, cache)) if held_out else None,
            callbacks=default_callbacks(learner.method, folder) if callbacks is None else callbacks,
            identity={"tasks": parts, "sharing": sharing.model_dump(mode="json")} | GramStart.identity(start),
            accelerator=processes,
        )
        history = trainer.run(resume).history

    module.train(False)
    metrics = {"seconds": time.monotonic() - started}
    samples = [ValidationSource(module.tasks[name], data, cache) for name, data in held_out.items()]
    metrics |= calibrate(learner, samples)
    if held_out:
        metrics |= validation(module.evaluate(held_out, cache))
    metrics |= describe(learner)

    return RunResult(metrics, history, folder, learner), module


def _sources(
    module: MultiTask,
    tasks: Mapping[str, TaskData],
    augmentation: Augmentation,
    views: int,
    options: TrainOptions,
    cache: FeatureCache,
) -> list[TrainingSource]:
    """Return what each task trains on, with the classifier whose loss its samples enter."""
    sources = []
    for name, data in tasks.items():
        classifier, places = module.classifier(name)
        source = TrainingSource(classifier, data.train, augmentation, views, options, cache, places)
        sources.append(source)
    return sources


def _batches(sources: Sequence[TrainingSource], exponent: float, options: TrainOptions) -> MultiTaskBatches:
    """Return batches that mix the tasks."""
    states = [source.states() for source in sources]
    if not all(states):  # a batch holds samples of several tasks, so all of them read pixels
        states = [[] for _ in sources]

    return MultiTaskBatches(
        [source.batches(kept) for source, kept in zip(sources, states, strict=True)],
        [len(source.data) for source in sources],
        exponent,
        options.batch_size,
        options.seed,
        options.drop_last,
    )


def _embeddings(sources: Sequence[TrainingSource]) -> Tensor:
    """Return the (n, d) embeddings of all tasks' training samples, one view of each."""
    return torch.cat([source.training_data()[0][0] for source in sources])


def _checked(tasks: Mapping[str, TaskData]) -> dict[str, TaskData]:
    """Return the tasks with one label per sample.

    Raises:
        DataError: If there is no task, or one without training samples.
    """
    if not tasks:
        raise DataError("multitask training needs at least one data set.")

    for name, data in tasks.items():
        if not len(data.train):
            raise DataError(f"{name}: there are no training samples.")
    return {name: TaskData(data.train.one_label_each(), data.val) for name, data in tasks.items()}
