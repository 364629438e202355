"""DBOM as a scanner: the learner, trained by the trainer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.classification.evaluate import image_embeddings
from vlprompt.classification.fit import fit
from vlprompt.core.errors import ConfigError
from vlprompt.core.options import check_options, describe_problems
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.data.compositions import CompositionDataset
from vlprompt.data.transforms import Preprocess
from vlprompt.learners import create_learner
from vlprompt.learners.dbom import DBOM
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security.scanners import SCANNERS, Scanner
from vlprompt.training.callback_lists import run_callbacks
from vlprompt.training.options import TrainSection

__all__ = ["DBOMScanner"]

TRAINING: dict[str, Any] = {
    "epochs": 40, "batch_size": 256, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.5, "schedule": "cosine",
    "eval_every": 1000,
}  # fmt: skip
"""Training options unless others are given."""

_SET_BY_SCANNER = ("seed", "triggers")  # options of the learner that the scanner's own arguments decide


@SCANNERS.register(
    "dbom",
    summary="soft prompts of (trigger, object) compositions",
    paper="2508.01932",
    needs=("compositions",),
)
class DBOMScanner(Scanner):
    """See :class:`vlprompt.learners.dbom.DBOM`.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`.
        learner: Options of the learner.
        train: What differs from :data:`TRAINING`, see :class:`vlprompt.training.options.TrainSection`.
    """

    names_objects = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        triggers: Sequence[str],
        *,
        learner: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, classnames, triggers)
        self.options = dict(learner or {})
        self.training = {**TRAINING, **(train or {})}
        self._build(1)

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """See :meth:`Scanner.option_problems`: options of the learner and of its training."""
        problems = []
        learner = dict(options.get("learner") or {})

        for name in _SET_BY_SCANNER:
            if name in learner:
                problems.append(
                    f"learner.{name}: the experiment decides it; write protocol.seeds or compositions.triggers."
                )
                learner.pop(name)

        try:
            check_options(DBOM, learner, "learner")
        except ConfigError as error:
            problems += [f"learner.{problem}" for problem in error.problems]

        train = dict(options.get("train") or {})
        if "seed" in train:
            problems.append(f"train.seed: use protocol.seeds=[{train.pop('seed')}].")

        try:
            TrainSection(**train)
        except ValidationError as error:
            problems += describe_problems(error, TrainSection, "train")

        return problems

    def _build(self, seed: int) -> None:
        options = {**self.options, "triggers": list(self.triggers), "seed": seed}
        learner = create_learner("dbom", self.backbone, self.classnames, **options)
        assert isinstance(learner, DBOM)
        self.learner: DBOM = learner
        self.reads = learner.reads

    @property
    def threshold(self) -> float:
        """See :class:`Scanner`; the learner's."""
        return self.learner.threshold

    def learned(self) -> dict[str, Tensor]:
        """See :meth:`Scanner.learned`."""
        return self.learner.trainable_state()

    def embed_images(self, images: Tensor) -> Tensor:
        """See :meth:`DBOM.embed_images`."""
        return self.learner.embed_images(images)

    def rows(self, data: ImageDataset, cache: FeatureCache | None = None) -> Tensor:
        """See :meth:`Scanner.rows`; evidence of pixels at their own size is read before the tower's preparation."""
        if self.learner.evidence != "native":
            return super().rows(data, cache)
        return image_embeddings(self.learner, data, cache=cache)

    @property
    def preprocess(self) -> Preprocess:
        """See :meth:`ImageScanner.preprocess`; the learner's."""
        return self.learner.preprocess

    def learn(
        self,
        train: CompositionDataset,
        val: CompositionDataset,
        cache: FeatureCache | None,
        seed: int,
        folder: Path | None,
    ) -> None:
        """See :meth:`Scanner.learn`: train a fresh learner."""
        self._build(seed)
        options = {**self.training, "seed": seed}
        trained = fit(
            self.learner,
            train,
            val,
            folder=folder,
            resume=True,
            cache=cache,
            callbacks=run_callbacks(folder),
            **options,
        )
        self.history = trained.history

        if folder is not None:  # a learner is quickly trained, and its checkpoint is large
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)

    def judge(self, rows: Tensor) -> Verdicts:
        """See :meth:`DBOM.judge`."""
        return self.learner.judge(rows)
