"""Training a learner on a data set: the public ``vlprompt.fit``."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from vlprompt.classification.evaluate import evaluate
from vlprompt.classification.label_space import check_learner, dataset_for, in_learner_space, known_classes
from vlprompt.classification.recipe import AutomaticRecipe, RecipeName, find_recipe, paper_options
from vlprompt.classification.sources import TrainingSource, ValidationSource
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator
from vlprompt.data import PREFIX_GIB, Augmentation, FeatureCache, ImageDataset
from vlprompt.data.base import hash_strings
from vlprompt.data.loading import Workers, takes_workers
from vlprompt.learners import Learner
from vlprompt.meta.regulated import regulated
from vlprompt.meta.start import GramStart, start_learner
from vlprompt.training.callback_lists import default_callbacks
from vlprompt.training.callbacks import Callback, check_callbacks
from vlprompt.training.options import TrainOptions, check_resume
from vlprompt.training.trainer import Trainer

__all__ = ["RunResult", "calibrate", "describe", "fit", "parse_options", "run_identity", "validation"]

log = logging.getLogger(__name__)

SeveralLabels = Literal["auto", "together", "split"]
_LENGTHS = {"epochs", "steps", "steps_per_shot"}  # each says how long a run is


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind.

    Attributes:
        metrics: Validation metrics of the selected weights (``val/...``), what the learner chose on validation data
            (``chosen/...``), what describes it (``learned/...``), and ``seconds``.
        history: One record per epoch.
        path: The run's folder, None if nothing was written.
        learner: The trained learner.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)
    path: Path | None
    learner: Learner = field(repr=False)


@takes_workers
def fit(
    learner: Learner,
    train: ImageDataset | Any,
    val: ImageDataset | Any | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    augmentation: str = "none",
    views: int = 1,
    cache_dir: str | Path | None = None,
    prefix_gib: float = PREFIX_GIB,
    cache: FeatureCache | None = None,
    callbacks: Sequence[Callback] | None = None,
    recipe: RecipeName | None = None,
    several_labels: SeveralLabels = "auto",
    workers: Workers | None = None,
    **options: Any,
) -> RunResult:
    """Train a learner; its parameters are changed in place.

    Without any training option but the seed the learner's own recipe is used (``recipe="auto"``): the paper's options
    on the backbones of the papers, elsewhere those that a small search finds on held-back shots (see
    :mod:`vlprompt.classification.recipe`). With an option, all others have the defaults of :class:`TrainOptions`.

    If the learner leaves the image tower alone, image embeddings are computed once per view and training runs
    on them. If it enters the tower further up, the tower's states below are computed once per fixed view.

    Args:
        learner: See :func:`vlprompt.create_learner`.
        train: Training samples; class names must be the learner's. A torch ``Dataset`` or a list of pairs (image,
            label) too; if it doesn't name its classes, label c is the learner's class c.
        val: Validation samples, for curves and ``select="best"``. Never give test data here.
        folder: Where checkpoints go; None writes nothing.
        resume: Continue from the checkpoint in ``folder``; on a CPU the result is the same to the last bit.
        augmentation: ``"none"``, ``"flip"``, ``"crop_flip"`` or, with the smallest share of the image that a crop
            keeps, ``"crop_flip:0.5"`` (default share 0.08). See :class:`vlprompt.data.transforms.Augmentation`.
        views: Fixed augmented views per image that the epochs take in turn (their embeddings are cached); 0
            draws new ones every epoch, which rules caching out.
        cache_dir: Where embeddings are stored between runs; None holds them in memory.
        prefix_gib: GiB that kept prefixes may take, in memory or in ``cache_dir``: what a learner that enters the image
            tower leaves as it is (stem, first blocks) is computed once per fixed view. 0 keeps none.
        cache: A cache that is used in place of one in ``cache_dir``.
        callbacks: Replaces the default one, :class:`vlprompt.training.callbacks.ProgressBar`. A
            :class:`vlprompt.training.trackers.Tracker` is one too.
        recipe: ``"auto"``: as without options; options that are given take precedence. ``"paper"``: the paper's options
            on any backbone. ``"none"``: the defaults of :class:`TrainOptions`. None: ``"auto"`` without options,
            ``"none"`` with options.
        several_labels: How images with several labels are learned from. ``"together"``: one sample, whose loss is over
            all its labels (binary cross entropy); ``"split"``: one sample for each label; ``"auto"``: together where
            the learner's loss can, but split as ELEVATER draws.
        workers: Processes that read and augment images; ``"auto"``, the default, chooses by the cores and the cost of
            a sample. No result depends on it.
        **options: See :class:`TrainOptions`.

    Raises:
        ConfigError: For wrong options, all at once.
        DataError: If there are no samples, or the classes differ.
        NonFiniteError: If the loss or a gradient is NaN or infinite.
        CheckpointError: If the checkpoint to resume is damaged or another run's.
    """
    _check_arguments(recipe=recipe, several_labels=several_labels, views=views, prefix_gib=prefix_gib)
    parse_options(options)
    check_resume(folder, resume)
    check_callbacks(callbacks)
    check_learner(learner)
    train = _with_labels(learner, _in_order(learner, dataset_for(learner, train, "train")), several_labels)
    val = None if val is None else dataset_for(learner, val, "val")
    _check_samples(learner, train)
    started = time.monotonic()
    processes = accelerator()
    learner.to(learner.backbone.device_or(processes.device))
    folder = None if folder is None else user_path(folder)
    cache = FeatureCache(cache_dir, prefix_gib=prefix_gib) if cache is None else cache

    automatic = _recipe(learner, train, val, recipe, options, cache)
    train, val = automatic.train, automatic.val
    given = _without_length(automatic.options) if options.keys() & _LENGTHS else automatic.options
    checked = parse_options({**given, **options}).for_shots(train.labels)

    source = TrainingSource(learner, train, Augmentation.parse(augmentation), views, checked, cache)
    held_out = None if val is None else ValidationSource(learner, val, cache)

    learner.enter_folder(folder, resume)
    start = start_learner(learner, checked.init)
    if learner.prepares:
        learner.prepare(*source.training_data())
    learner.survey([source])

    history: list[dict[str, Any]] = []
    if learner.solves:
        history = [_solve(source, held_out)]
    elif learner.learned_parameters() and checked.epochs:
        trainer = Trainer(
            regulated(learner, start, lambda: source.training_data()[0][0], checked.optimizer),
            source.batches(),
            checked,
            folder,
            validate=None if val is None else (lambda: evaluate(learner, val, cache=cache)),
            callbacks=default_callbacks(learner.method, folder) if callbacks is None else callbacks,
            identity=run_identity(learner, train, augmentation, views) | GramStart.identity(start),
            accelerator=processes,
        )
        history = trainer.run(resume).history

    learner.eval()
    metrics = calibrate(learner, [] if held_out is None else [held_out])
    if held_out is not None:
        metrics |= validation(evaluate(learner, held_out.data, cache=cache))
    metrics |= describe(learner) | automatic.figures

    return RunResult({"seconds": time.monotonic() - started, **metrics}, history, folder, learner)


def _check_arguments(
    *,
    recipe: RecipeName | None,
    several_labels: SeveralLabels,
    views: Annotated[int, Field(ge=0)],
    prefix_gib: Annotated[float, Field(ge=0)],
) -> None:
    """Check the arguments of :func:`fit` that are no training options."""
    values = {
        "recipe": recipe,
        "several_labels": several_labels,
        "views": views,
        "prefix_gib": prefix_gib,
    }
    check_options(_check_arguments, values, source="vlprompt.fit")


def _without_length(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return training options that do not say how long a run is."""
    return {name: value for name, value in options.items() if name not in _LENGTHS}


def _recipe(
    learner: Learner,
    train: ImageDataset,
    val: ImageDataset | None,
    recipe: RecipeName | None,
    options: Mapping[str, Any],
    cache: FeatureCache,
) -> AutomaticRecipe:
    """Return what to train on, and the options that nobody gave."""
    if recipe == "none" or (recipe is None and options.keys() - {"seed"}):
        return AutomaticRecipe({}, train, val, {})

    if recipe == "paper":
        return AutomaticRecipe(paper_options(learner, train), train, val, {})

    def trial(
        copy: Learner, kept: ImageDataset, held: ImageDataset | None, changes: Mapping[str, Any]
    ) -> None:
        fit(copy, kept, held, cache=cache, callbacks=(), **{**changes, **options})

    return find_recipe(learner, train, val, int(options.get("seed", 1)), cache, trial)


def parse_options(options: Mapping[str, Any]) -> TrainOptions:
    """Validate training options.

    Raises:
        ConfigError: With every mistake and the nearest valid key.
    """
    try:
        return TrainOptions(**options)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, TrainOptions), "training options") from error


def calibrate(learner: Learner, sources: Sequence[ValidationSource]) -> dict[str, float]:
    """Let a learner choose what it chooses on validation data; return the choices as metrics (``chosen/...``).

    Args:
        learner: Changed in place.
        sources: The validation data of every task; if there are none, what would have been chosen is warned of.
    """
    if not sources:
        if learner.chooses:
            names = " and ".join(learner.chooses)
            log.warning(
                "%s chooses %s on validation data, and there are none: what its options say stays.",
                learner.title(),
                names,
            )
        return {}

    choices = learner.calibrate(sources)
    return {f"chosen/{name}": float(value) for name, value in choices.items()}


def validation(scores: Mapping[str, float]) -> dict[str, float]:
    """Return scores on validation data as metrics (``val/...``)."""
    return {f"val/{name}": value for name, value in scores.items()}


def describe(learner: Learner) -> dict[str, float]:
    """Return the numbers by which a learner describes what it learned, as metrics (``learned/...``)."""
    return {f"learned/{name}": value for name, value in learner.figures().items()}


def _solve(source: TrainingSource, held_out: ValidationSource | None) -> dict[str, Any]:
    """Let a learner find all parameters at once; return the one record of its history."""
    samples = None if held_out is None else held_out.validation_data()
    views, labels = source.training_data()
    train = (views.flatten(0, 1), torch.cat([labels] * len(views)))

    solution = source.learner.solve(train, samples, seed=source.options.seed, views=len(views))
    return {"epoch": 0, **{name: value for name, value in solution.items() if value is not None}}


def _with_labels(learner: Learner, train: ImageDataset, several_labels: SeveralLabels) -> ImageDataset:
    """Return training data whose samples have as many labels as the loss reads."""
    if not train.multi_label or several_labels == "split":
        return train.one_label_each()

    if several_labels == "together" and not learner.takes_several_labels:
        raise ConfigError(
            [
                f"several_labels: {learner.title()} has a loss over single labels; write split, which makes one sample "
                "of each label of an image."
            ],
            train.name,
        )
    is_elevaters = train.info.get("sampling") == "elevater"
    if several_labels == "auto" and (is_elevaters or not learner.takes_several_labels):
        return train.one_label_each()
    return train


def _in_order(learner: Learner, train: ImageDataset) -> ImageDataset:
    """Return training data whose labels are the learner's, where it has the same class names in another order."""
    same = known_classes(learner, train) == len(train.classnames) == len(learner.classnames)
    return in_learner_space(learner, train) if same else train


def _check_samples(learner: Learner, train: ImageDataset) -> None:
    """Refuse an empty data set, and one with another number of classes."""
    if not len(train):
        raise DataError(f"{train.name}: there are no training samples.")

    if len(train.classnames) != len(learner.classnames):
        raise DataError(
            f"{train.name} has {len(train.classnames)} classes, the learner {len(learner.classnames)}. "
            "Build it with classnames=train.classnames."
        )


def run_identity(learner: Learner, train: ImageDataset, augmentation: str, views: int) -> dict[str, Any]:
    """Return facts that a run and its continuation must share."""
    samples = (f"{train.key(i)}={sample.label}" for i, sample in enumerate(train.samples))
    return {
        "learner": learner.method,
        "learner_options": {k: str(v) for k, v in learner.options.items()},
        "backbone": learner.backbone.fingerprint["id"],
        "precision": learner.backbone.precision,
        "data": train.name,
        "samples": hash_strings(samples),
        "classnames": hash_strings(learner.classnames),
        "augmentation": [augmentation, views],
    }
