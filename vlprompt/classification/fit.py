"""Training a learner on a data set: the public ``vlprompt.fit``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vlprompt.classification.evaluate import encoder_of, evaluate, image_embeddings
from vlprompt.classification.gram import GramStart, regulated, start_learner
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.options import describe_problems
from vlprompt.core.processes import accelerator
from vlprompt.data import Augmentation, FeatureCache, ImageDataset
from vlprompt.data.base import hash_strings
from vlprompt.learners import Learner
from vlprompt.training.batches import Batch, Batches, TensorBatches, epoch_plan
from vlprompt.training.callbacks import Callback, default_callbacks
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["ImageBatches", "RunResult", "TrainingSource", "fit", "parse_options", "run_identity"]


@dataclass(frozen=True)
class RunResult:
    """What a training run left behind.

    Attributes:
        metrics: Validation metrics of the kept weights (``val/...``), what the learner chose on validation data
            (``chosen/...``), and ``seconds``.
        history: One record per epoch.
        path: The run's folder, None if nothing was written.
        learner: The trained learner.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(repr=False)
    path: Path | None
    learner: Learner = field(repr=False)


class ImageBatches:
    """Batches of decoded, augmented pixels, for learners that touch the image tower.

    Args:
        data: Training samples.
        preprocess: The backbone's.
        augmentation: What makes a view of an image.
        options: ``batch_size``, ``seed`` and ``drop_last`` are read.
        views: Number of fixed views per image; 0 draws a new one every epoch.
    """

    def __init__(
        self,
        data: ImageDataset,
        preprocess: Any,
        augmentation: Augmentation,
        options: TrainOptions,
        views: int,
    ) -> None:
        self.data, self.preprocess, self.augmentation = data, preprocess, augmentation
        self.options, self.views = options, views
        self.targets = {name: torch.tensor(values) for name, values in data.targets.items()}

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(
            len(self.data), self.options.batch_size, self.options.seed, epoch, self.options.drop_last
        )

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        view = epoch % self.views if self.views else epoch
        images = [self._view(int(i), view) for i in indices]
        index = torch.as_tensor(indices)
        known = {name: values[index] for name, values in self.targets.items()}
        batch = {"image": torch.stack(images), **known, "index": index}
        if self.views or not self.augmentation.is_random:  # these very pixels come again
            batch["view"] = torch.full_like(index, view if self.augmentation.is_random else 0)
        return batch

    def _view(self, index: int, view: int) -> Tensor:
        image, _ = self.data[index]
        return self.augmentation.augment(
            image, self.preprocess, self.options.seed, self.data.key(index), view
        )


def fit(
    learner: Learner,
    train: ImageDataset,
    val: ImageDataset | None = None,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    augmentation: str = "none",
    views: int = 1,
    cache_dir: str | Path | None = None,
    cache: FeatureCache | None = None,
    callbacks: Sequence[Callback] | None = None,
    **options: Any,
) -> RunResult:
    """Train a learner; its parameters are changed in place.

    If the learner leaves the image tower alone, image embeddings are computed once per view and training runs
    on them.

    Args:
        learner: See :func:`vlprompt.create_learner`.
        train: Training samples; class names must be the learner's.
        val: Validation samples, for curves and ``select="best"``. Never give test data here.
        folder: Where checkpoints and TensorBoard events go; None writes nothing.
        resume: Continue from the checkpoint in ``folder``; on a CPU the result is the same to the last bit.
        augmentation: ``"none"``, ``"flip"``, ``"crop_flip"`` or, with the smallest share of the image that a crop
            keeps, ``"crop_flip:0.5"`` (default share 0.08).
        views: Fixed augmented views per image that the epochs take in turn (their embeddings are cached); 0
            draws new ones every epoch, which rules caching out.
        cache_dir: Where embeddings are kept between runs; None keeps them in memory.
        cache: A cache that is used in place of one in ``cache_dir``.
        callbacks: Replaces the default ones (progress, TensorBoard).
        **options: See :class:`TrainOptions`.

    Raises:
        ConfigError: For wrong options, all at once.
        DataError: If there are no samples, or the classes differ.
        NonFiniteError: If the loss or a gradient is NaN or infinite.
        CheckpointError: If the checkpoint to resume is damaged or another run's.
    """
    checked = parse_options(options)
    _check_samples(learner, train)
    started, processes = time.monotonic(), accelerator()
    learner.to(processes.device)
    folder = None if folder is None else Path(folder)
    cache = FeatureCache(cache_dir) if cache is None else cache
    source = TrainingSource(learner, train, Augmentation.parse(augmentation), views, checked, cache)
    start = start_learner(learner, checked.init)
    _call(learner, "prepare", source.training_data)
    _call(learner, "survey", lambda: (source,))
    solve = getattr(learner, "solve", None)
    if solve is not None:
        found = solve(*source.solver_data(val), seed=checked.seed)
        history = [{"epoch": 0, **{k: v for k, v in found.items() if v is not None}}]
    elif not any(p.requires_grad for p in learner.parameters()) or checked.epochs == 0:
        history = []
    else:
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
    metrics = {} if val is None else _validate(source, val)
    metrics |= {f"learned/{k}": v for k, v in (_call(learner, "figures", tuple) or {}).items()}
    return RunResult({"seconds": time.monotonic() - started, **metrics}, history, folder, learner)


def parse_options(options: Mapping[str, Any]) -> TrainOptions:
    """Validate training options.

    Raises:
        ConfigError: With every mistake and the nearest valid key.
    """
    try:
        return TrainOptions(**options)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, TrainOptions), "training options") from error


@dataclass(frozen=True)
class TrainingSource:
    """Turns a data set into what a learner trains on: cached embeddings where exact, pixels otherwise."""

    learner: Learner
    data: ImageDataset
    augmentation: Augmentation
    views: int
    options: TrainOptions
    cache: FeatureCache

    @property
    def repeats(self) -> bool:
        """Whether the same pixels come again in later epochs, so what is computed from them may be kept."""
        return self.views > 0 or not self.augmentation.is_random

    def batches(self) -> Batches:
        """Return what the trainer iterates over."""
        if not self.learner.static_images or not self.repeats:
            preprocess = self.learner.backbone.preprocess
            return ImageBatches(self.data, preprocess, self.augmentation, self.options, self.views)
        embeddings = self._embeddings()
        known = {name: torch.tensor(values) for name, values in self.data.targets.items()}
        tensors = {"embedding": embeddings, **{n: [t] * len(embeddings) for n, t in known.items()}}
        return TensorBatches(tensors, self.options.batch_size, self.options.seed, self.options.drop_last)

    def solver_data(self, val: ImageDataset | None) -> tuple[Any, Any]:
        """Return (embeddings, labels) of train, all views stacked, and of val."""
        views, labels = self.training_data()
        train = views.flatten(0, 1), labels.repeat(len(views))
        return train, None if val is None else self.validation_data(val)

    def training_data(self) -> tuple[Tensor, Tensor]:
        """Return (V, n, d) embeddings of every view of the training samples, and their (n,) labels."""
        return torch.stack(self._embeddings()), torch.tensor(self.data.labels)

    def validation_data(self, val: ImageDataset) -> tuple[Tensor, Tensor]:
        """Return (n, d) embeddings and (n,) labels."""
        return image_embeddings(self.learner, val, cache=self.cache), torch.tensor(val.labels)

    def _embeddings(self) -> list[Tensor]:
        count = max(1, self.views) if self.augmentation.is_random else 1
        encode, fingerprint = encoder_of(self.learner)
        return [
            self.cache.features(
                self.data,
                encode,
                self.learner.backbone.preprocess,
                fingerprint=fingerprint,
                augmentation=self.augmentation,
                seed=self.options.seed,
                view=view,
            )
            for view in range(count)
        ]


def _validate(source: TrainingSource, val: ImageDataset) -> dict[str, float]:
    """Let the learner choose what it chooses on validation data; return that, and its metrics with it."""
    chosen = _call(source.learner, "calibrate", lambda: source.validation_data(val)) or {}
    chosen |= _call(source.learner, "calibrate_on", lambda: (val, source.validation_data(val)[0])) or {}
    metrics = evaluate(source.learner, val, cache=source.cache)
    return {
        **{f"chosen/{k}": float(v) for k, v in chosen.items()},
        **{f"val/{k}": v for k, v in metrics.items()},
    }


def _call(learner: Learner, hook: str, data: Callable[[], tuple[Any, ...]]) -> Any:
    """Call an optional method of the learner; what it needs is only computed if it exists."""
    method = getattr(learner, hook, None)
    return None if method is None else method(*data())


def _check_samples(learner: Learner, train: ImageDataset) -> None:
    if not len(train):
        raise DataError(f"{train.name}: there are no training samples.")
    if len(train.classnames) != len(learner.classnames):
        raise DataError(
            f"{train.name} has {len(train.classnames)} classes, the learner {len(learner.classnames)}. "
            "Build it with classnames=train.classnames."
        )


def run_identity(learner: Learner, train: ImageDataset, augmentation: str, views: int) -> dict[str, Any]:
    """Facts that a run and its continuation must share."""
    return {
        "learner": learner.method,
        "learner_options": {k: str(v) for k, v in learner.options.items()},
        "backbone": learner.backbone.fingerprint["id"],
        "data": train.name,
        "samples": hash_strings(f"{train.key(i)}={label}" for i, label in enumerate(train.labels)),
        "classnames": hash_strings(learner.classnames),
        "augmentation": [augmentation, views],
    }
