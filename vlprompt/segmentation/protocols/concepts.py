"""Searching concepts for a segmenter: a vector per class, scored beside class names and the data set's own phrases.

Paper: Yi et al., arXiv 2305.18993 (see :mod:`vlprompt.segmentation.concepts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field
from torch import Tensor

from vlprompt.backbones import missing_weights
from vlprompt.concepts.search import ConceptSearch, SearchResult
from vlprompt.core.errors import DataError
from vlprompt.core.files import path_fingerprint
from vlprompt.data import load_segmentation
from vlprompt.data.fingerprint import data_fingerprint, missing_data
from vlprompt.data.segmentation import MaskDataset
from vlprompt.experiments.backbone import build_backbone
from vlprompt.experiments.concept_study import (
    CLASS_NAMES,
    ConceptConfig,
    ConceptData,
    ConceptExperiment,
    Scores,
)
from vlprompt.experiments.config import STRICT, BackboneOptions
from vlprompt.segmentation import SEGMENTERS, Segmenter, create_segmenter
from vlprompt.segmentation.concepts import MaskConcepts, named, score_concepts, search_masks
from vlprompt.segmentation.config import backbone_problems, name_problems, option_problems
from vlprompt.segmentation.evaluate import evaluate_segmenter
from vlprompt.segmentation.losses import LossName
from vlprompt.segmentation.protocols.base import weight_files
from vlprompt.training.options import TrainOptions

__all__ = ["ConceptMaskConfig", "ConceptMaskExperiment"]

_SEGMENTER = "clipseg"  # unless another one is named

PHRASES = "phrases"
"""The baseline: every pair is asked for by the data set's own phrase."""


class ConceptMaskData(ConceptData):
    """The ``data:`` section: names as ``load_segmentation`` takes them."""

    name: str = "scenes/masks"
    root: str | None = Field(None, description="where data sets lie")


class ConceptStart(BaseModel):
    """The ``concepts:`` section."""

    model_config = STRICT

    init: Literal["text", "normal"] = Field(
        "text", description="where the search starts: features of the class names, or noise of their spread"
    )


class ConceptMaskConfig(ConceptConfig):
    """A whole experiment that searches concepts for a segmenter."""

    expected_task: ClassVar[str] = "segmentation"

    segmenter: dict[str, Any] = Field(
        default_factory=lambda: {"name": _SEGMENTER}, description="name and the model's own options"
    )
    backbone: BackboneOptions = Field(default_factory=BackboneOptions)
    data: ConceptMaskData = Field(default_factory=ConceptMaskData)
    concepts: ConceptStart = Field(default_factory=ConceptStart)
    loss: LossName = "dice_bce"

    @classmethod
    def raw_problems(cls, content: Mapping[str, Any]) -> list[str]:
        """See :meth:`ExperimentConfig.raw_problems`: names of the segmenter, the backbone and data sets."""
        problems = super().raw_problems(content)
        segmenter = content.get("segmenter", {})
        if isinstance(segmenter, Mapping):
            name = str(segmenter.get("name", _SEGMENTER))
            options = {key: value for key, value in segmenter.items() if key != "name"}
            problems += option_problems("segmenter", SEGMENTERS, name, options)

        problems += backbone_problems({"backbone": content.get("backbone", {})})

        data = content.get("data")
        if isinstance(data, Mapping):
            problems += name_problems("data.name", [data.get("name")])
            also_test = data.get("also_test", {})
            if isinstance(also_test, Mapping):
                for label, name in also_test.items():
                    problems += name_problems(f"data.also_test.{label}", [name])

        return problems

    @property
    def segmenter_name(self) -> str:
        """The segmenter's registry name."""
        return str(self.segmenter.get("name", _SEGMENTER))

    @property
    def segmenter_options(self) -> dict[str, Any]:
        """The segmenter's own options."""
        return {key: value for key, value in self.segmenter.items() if key != "name"}


class ConceptMaskExperiment(ConceptExperiment):
    """Concepts in the place of a frozen segmenter's phrases."""

    config: ConceptMaskConfig
    baselines: ClassVar[tuple[str, ...]] = (CLASS_NAMES, PHRASES)
    metrics: ClassVar[tuple[str, ...]] = ("dice", "iou")
    headline_metric: ClassVar[str] = "dice"

    @property
    def host_name(self) -> str:
        """See :attr:`ConceptExperiment.host_name`."""
        return self.config.segmenter_name

    def host_facts(self) -> dict[str, Any]:
        """See :meth:`ConceptExperiment.host_facts`."""
        return {"backbone_fingerprint": self.segmenter.backbone.fingerprint}

    def test_names(self) -> dict[str, str]:
        """See :meth:`ConceptExperiment.test_names`."""
        return {self.config.data.split: self.config.data.name, **self.config.data.also_test}

    def classnames(self) -> tuple[str, ...]:
        """See :meth:`ConceptExperiment.classnames`."""
        return self._tests[self.config.data.split].classnames

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        config = self.config
        names = self.test_names().values()
        fingerprints = {name: data_fingerprint(name, config.data.root) for name in names}
        for path in weight_files(config.backbone, config.segmenter_options):
            fingerprints[path] = path_fingerprint(path)
        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        config = self.config
        backbone = config.backbone
        sentences = [missing_data(name, config.data.root) for name in self.test_names().values()]
        sentences.append(missing_weights(backbone.name, backbone.pretrained, backbone.cache_dir))
        return list(dict.fromkeys(sentence for sentence in sentences if sentence))

    def score_baseline(self, method: str) -> Scores:
        """See :meth:`ConceptExperiment.score_baseline`."""
        scores = {}
        for label, test in self._tests.items():
            data = named(test) if method == CLASS_NAMES else test
            scores[label] = evaluate_segmenter(self.segmenter, data, boundary=False).metrics
        return scores

    def search(
        self,
        images: int | None,
        options: TrainOptions,
        folder: Path,
        unfreeze: Sequence[str] = (),
        start: Tensor | None = None,
    ) -> SearchResult[MaskConcepts]:
        """See :meth:`ConceptExperiment.search`."""
        config = self.config
        train = self._load(config.data.name, "train", images=images, seed=options.seed)
        val = self._load(config.data.name, "val") if config.data.validate_on == "val" else None
        return search_masks(
            self.segmenter,
            train,
            val,
            options=options,
            init=config.concepts.init,
            loss=config.loss,
            unfreeze=unfreeze,
            start=start,
            folder=folder,
            resume=True,
        )

    def score(self, module: ConceptSearch) -> Scores:
        """See :meth:`ConceptExperiment.score`."""
        vectors = module.concepts().detach()
        return {label: score_concepts(self.segmenter, vectors, test) for label, test in self._tests.items()}

    @cached_property
    def segmenter(self) -> Segmenter:
        """The frozen host."""
        config = self.config
        # The strategy says which states are kept; what learns is for the search to say.
        strategy = "zero_shot" if config.second_stage is None else "decoder"
        backbone = build_backbone(config.backbone)
        segmenter = create_segmenter(config.segmenter_name, backbone, strategy, **config.segmenter_options)
        segmenter.requires_grad_(False)

        return segmenter

    @cached_property
    def _tests(self) -> dict[str, MaskDataset]:
        """Label to test set; all have the same classes."""
        split = self.config.data.split
        tests = {label: self._load(name, split) for label, name in self.test_names().items()}
        for label, test in tests.items():
            if test.classnames != tests[split].classnames:
                raise DataError(
                    f"data.also_test.{label}: {test.name} has other classes than {self.config.data.name}."
                )

        return tests

    def _load(self, name: str, split: str, **draw: Any) -> MaskDataset:
        return load_segmentation(name, split, root=self.config.data.root, **draw)
