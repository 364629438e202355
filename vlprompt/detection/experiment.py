"""Experiments of detection: concepts for a frozen detector, scored beside the class names on every test set."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.concepts.search import SearchResult
from vlprompt.core.errors import DataError
from vlprompt.core.files import path_fingerprint
from vlprompt.detection import create_detector
from vlprompt.detection._transformers import is_fetched
from vlprompt.detection.base import Detector
from vlprompt.detection.config import DetectionConfig
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.detection.search import ConceptDetection, class_vectors, search_concepts
from vlprompt.detection.sources import boxes_fingerprint, load_boxes, missing_boxes
from vlprompt.experiments.concept_study import ConceptExperiment, Scores
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment
from vlprompt.training.options import TrainOptions

__all__ = ["DetectionExperiment", "build"]

log = logging.getLogger("vlprompt.detection")


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, DetectionConfig)
    return DetectionExperiment(DetectionConfig.parse(raw, content, source))


class DetectionExperiment(ConceptExperiment):
    """Concepts for one detector; cells share it, and what it sees of the test images."""

    config: DetectionConfig
    metrics = ("AP", "AP50")
    headline_metric = "AP50"

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__(config)
        self._test_features: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def detector(self) -> Detector:
        """The host."""
        return create_detector(self.config.detector_name, **self.config.detector_options)

    @cached_property
    def train(self) -> DetectionData:
        """All training images."""
        return load_boxes(self.config.data.name, "train")

    @cached_property
    def val(self) -> DetectionData | None:
        """Validation images, if the configuration asks for them."""
        if self.config.data.validate_on == "none":
            return None
        return load_boxes(self.config.data.name, "val")

    @cached_property
    def tests(self) -> dict[str, DetectionData]:
        """Label to test set.

        Raises:
            DataError: If one has other classes than the training images.
        """
        split = self.config.data.split
        tests = {label: load_boxes(name, split) for label, name in self.test_names().items()}
        for label, test in tests.items():
            if test.classnames != self.train.classnames:
                raise DataError(
                    f"data.also_test.{label}: {test.name} has other classes than {self.train.name}."
                )

        return tests

    @property
    def host_name(self) -> str:
        """See :attr:`ConceptExperiment.host_name`."""
        return self.config.detector_name

    def host_facts(self) -> dict[str, Any]:
        """See :meth:`ConceptExperiment.host_facts`."""
        return {"detector": self.detector.identity}

    def test_names(self) -> dict[str, str]:
        """See :meth:`ConceptExperiment.test_names`."""
        return self.config.test_names()

    def classnames(self) -> tuple[str, ...]:
        """See :meth:`ConceptExperiment.classnames`."""
        return self.train.classnames

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        fingerprints = {f"{name}/{split}": boxes_fingerprint(name, split) for name, split in self._files()}
        for path in self.config.weight_paths():
            fingerprints[path] = path_fingerprint(path)
        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        sentences = [missing_boxes(name, split) for name, split in self._files()]
        pretrained = self.config.detector_options.get("pretrained")
        if pretrained is not None and not is_fetched(pretrained):
            sentences.append(
                f"the weights {pretrained!r} are not on this machine; the first run fetches them."
            )

        return list(dict.fromkeys(sentence for sentence in sentences if sentence))

    def score_baseline(self, method: str) -> Scores:
        """See :meth:`ConceptExperiment.score_baseline`."""
        if not self.detector.reads_text:
            log.info("%s is left out: this detector reads no text", method)
            return {}
        return self._scores(class_vectors(self.detector, self.train))

    def search(
        self,
        images: int | None,
        options: TrainOptions,
        folder: Path,
        unfreeze: Sequence[str] = (),
        start: Tensor | None = None,
    ) -> SearchResult[ConceptDetection]:
        """See :meth:`ConceptExperiment.search`."""
        return search_concepts(
            self.detector,
            self.train.few(images, options.seed),
            self.val,
            options=options,
            length=self.config.concepts.length,
            init=self.config.concepts.init,
            unfreeze=unfreeze,
            start=start,
            folder=folder,
            resume=True,
        )

    def score(self, module: ConceptDetection) -> Scores:
        """See :meth:`ConceptExperiment.score`."""
        return self._scores(module.concepts().detach(), same_features=module.static)

    def _scores(self, concepts: Tensor, same_features: bool = True) -> Scores:
        """Return average precision on every test set.

        Args:
            concepts: (C, L, d).
            same_features: Whether the detector still sees the images as it came; if so, they are encoded once.
        """
        scores = {}
        for label, test in self.tests.items():
            rows = self._features(label, test) if same_features else None
            scores[label] = average_precision(self.detector, concepts, test, rows)
        return scores

    def _features(self, label: str, test: DetectionData) -> dict[str, Tensor]:
        if label not in self._test_features:
            self._test_features[label] = features(self.detector, test)
        return self._test_features[label]

    def _files(self) -> list[tuple[str, str]]:
        """Return (name, split) of everything that is read."""
        name = self.config.data.name
        files = [(name, "train")]
        if self.config.data.validate_on == "val":
            files.append((name, "val"))
        files += [(test, self.config.data.split) for test in self.test_names().values()]
        return list(dict.fromkeys(files))
