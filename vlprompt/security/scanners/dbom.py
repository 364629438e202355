"""DBOM as a scanner: the learner, trained by the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.classification.fit import fit
from vlprompt.data import FeatureCache
from vlprompt.learners import create_learner
from vlprompt.learners._judgement import Judgement
from vlprompt.learners.dbom import DBOM
from vlprompt.security.compositions import CompositionDataset
from vlprompt.security.scanners import SCANNERS, Scanner

__all__ = ["DBOMScanner"]

TRAINING: dict[str, Any] = {
    "epochs": 40, "batch_size": 256, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.5, "schedule": "cosine",
}  # fmt: skip


@SCANNERS.register(
    "dbom", summary="soft prompts of (trigger, object) pairs", paper="2508.01932", needs=("pairs",)
)
class DBOMScanner(Scanner):
    """See :class:`vlprompt.learners.dbom.DBOM`.

    Args:
        backbone: See :class:`Scanner`.
        classnames: See :class:`Scanner`.
        triggers: See :class:`Scanner`.
        learner: Options of the learner.
        train: Training options, see :class:`vlprompt.training.options.TrainOptions`.
    """

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
        self.options, self.training = dict(learner or {}), {**TRAINING, **(train or {})}
        self._build(1)

    def _build(self, seed: int) -> None:
        options = {"seed": seed, **self.options, "triggers": list(self.triggers)}
        learner = create_learner("dbom", self.backbone, self.classnames, **options)
        assert isinstance(learner, DBOM)
        self.learner: DBOM = learner
        self.reads = learner.reads

    @property
    def threshold(self) -> float:
        """See :class:`Scanner`; the learner's own."""
        return self.learner.threshold

    def embed_images(self, images: Tensor) -> Tensor:
        """See :meth:`DBOM.embed_images`."""
        return self.learner.embed_images(images)

    def learn(
        self, train: CompositionDataset, val: CompositionDataset, cache: FeatureCache | None, seed: int
    ) -> None:
        """Train a fresh learner."""
        self._build(seed)
        place = None if cache is None else cache.root
        options = {"seed": seed, "eval_every": 1000, **self.training}
        fit(self.learner, train, val, cache_dir=place, callbacks=[], **options)

    def judge(self, embeddings: Tensor) -> Judgement:
        """See :meth:`DBOM.judge`."""
        if self.learner.training:  # switching forgets what text features were computed
            self.learner.eval()
        return self.learner.judge(embeddings)
