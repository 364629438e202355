"""What all experiments with trained segmentation models share: backbones, data, building, training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.backbones import Backbone, missing_weights
from vlprompt.core.errors import DataError
from vlprompt.core.files import path_fingerprint
from vlprompt.core.options import options_model
from vlprompt.core.paths import user_path
from vlprompt.data import load_segmentation
from vlprompt.data.fingerprint import data_fingerprint, missing_data
from vlprompt.data.segmentation import MaskDataset, overlaps
from vlprompt.experiments.backbone import build_backbone
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.config import BackboneOptions
from vlprompt.experiments.experiment import Experiment
from vlprompt.segmentation import STRATEGIES, Segmenter, create_segmenter
from vlprompt.segmentation.config import SegmentationConfig
from vlprompt.segmentation.fit import SegmentationFit, fit_segmenter
from vlprompt.training.callbacks import Callback

__all__ = ["SegmentationExperiment", "data_facts", "weight_files"]

log = logging.getLogger("vlprompt.run")

_NOTES = ("phrases_that_deny", "oracle_text", "split_source")  # of a data set, that results must record


class SegmentationExperiment(Experiment):
    """An experiment whose cells have the coordinates ``model``, ``method``, ``data``, ``images`` and ``seed``.

    Attributes:
        config_type: What its configurations are read as.
    """

    config_type: ClassVar[type[SegmentationConfig]] = SegmentationConfig
    config: SegmentationConfig
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        self._backbones: dict[str, Backbone] = {}
        self._data: dict[tuple[Any, ...], MaskDataset] = {}

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        data = self.config.data
        fingerprints = {name: data_fingerprint(name, data.root) for name in data.names}
        for path in self._weight_files:
            fingerprints[path] = path_fingerprint(path)
        return {name: value for name, value in fingerprints.items() if value}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        data = self.config.data
        sentences = [missing_data(name, data.root) for name in data.names]
        for label in self.config.models:
            section = self.config.model(label).backbone
            sentences.append(missing_weights(section.name, section.pretrained, section.cache_dir))
        return list(dict.fromkeys(sentence for sentence in sentences if sentence))

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        config = self.config
        return {
            "protocol": config.protocol.name,
            "data": config.data.names,
            "split": config.data.split,
            "images": config.protocol.images,
            "queries": config.data.queries,
            "seeds": config.protocol.seeds,
        }

    def backbone(self, model: str) -> Backbone:
        """Return a model's backbone, built once."""
        section = self.config.model(model).backbone
        key = section.model_dump_json()
        if key not in self._backbones:
            self._backbones[key] = build_backbone(section)
        return self._backbones[key]

    def data(self, cell: Cell, split: str) -> MaskDataset:
        """Return what a cell trains or tests on; training images that are tested on too are left out.

        Args:
            cell: Its ``data``, ``images`` and ``seed`` say what is drawn.
            split: ``"train"``, ``"val"`` or ``"test"``.
        """
        section = self.config.data
        images = {"train": cell.get("images"), "val": section.val_images, "test": section.test_images}[split]
        # Every seed is tested on the same images.
        seed = cell["seed"] if images and split != "test" else 1

        # Training images depend on the validation images too, which may be drawn by another seed.
        key = (cell["data"], split, images, cell["seed"] if split == "train" else seed)
        if key not in self._data:
            data = load_segmentation(cell["data"], split, images, seed, **section.arguments())
            if split == "train":
                data = _without_shared(data, {part: self.data(cell, part) for part in ("val", "test")})
            self._data[key] = data

        return self._data[key]

    def scored(self, cell: Cell) -> MaskDataset:
        """Return the pairs that a cell's figures are of."""
        return self.data(cell, self.config.data.split)

    def segmenter(self, cell: Cell, **changes: Any) -> Segmenter:
        """Build a cell's model, with other options than the configuration's if some are given."""
        model = self.config.model(cell["model"])
        method = self.config.method(cell["method"])
        options = {**model.options, **method.options}

        if cell.get("depth") is not None:
            options["depth"] = cell["depth"]

        options |= changes
        fields = options_model(STRATEGIES.get(method.name).target).model_fields
        if "seed" in fields:
            options.setdefault("seed", cell["seed"])
        return create_segmenter(model.name, self.backbone(cell["model"]), method.name, **options)

    def train(
        self,
        cell: Cell,
        segmenter: Segmenter,
        folder: Path | None,
        callbacks: Sequence[Callback] | None = None,
        **changes: Any,
    ) -> SegmentationFit:
        """Train a cell's model in place.

        Args:
            cell: What to train on.
            segmenter: What to train.
            folder: Where checkpoints go; an interrupted training continues from there. None keeps none.
            callbacks: See :func:`fit_segmenter`.
            **changes: Training options other than the configuration's.
        """
        train = self.data(cell, "train")
        val = self.data(cell, "val")
        log.info("%s: %d numbers learn from %d pairs", cell.name, segmenter.num_trainable(), len(train))
        options = self.config.train_options(cell["method"], seed=cell["seed"])
        return fit_segmenter(
            segmenter,
            train,
            val,
            folder=folder,
            resume=True,
            augmentation=self.config.data.augmentation,
            loss=self.config.loss,
            callbacks=callbacks,
            **{**options, **changes},
        )

    @cached_property
    def _weight_files(self) -> list[str]:
        """Files and folders that models start from."""
        paths: list[str] = []
        for label in self.config.models:
            spec = self.config.model(label)
            paths += weight_files(spec.backbone, spec.options)
        return list(dict.fromkeys(paths))


def weight_files(section: BackboneOptions, options: Mapping[str, Any]) -> list[str]:
    """Return the paths that a backbone, and a model with these options, are read from.

    Names of weights that are fetched are no paths.
    """
    weights = options.get("weights")
    more = [weights] if isinstance(weights, str) and user_path(weights).exists() else []
    return [*section.paths(), *more]


def data_facts(name: str, data: MaskDataset) -> dict[str, Any]:
    """Return what results must record of one split: notes, and of test data a fingerprint of its pairs.

    Args:
        name: What the configuration calls the data set.
        data: The split.
    """
    facts: dict[str, Any] = dict(data.fingerprint()) if data.split == "test" else {}
    facts |= {key: value for key, value in data.info.items() if key in _NOTES and value}
    return {f"{name}/{data.split}/{key}": value for key, value in facts.items()}


def _without_shared(train: MaskDataset, others: Mapping[str, MaskDataset]) -> MaskDataset:
    """Leave out training images whose very pixels lie in another split under any name."""
    shared = set()
    for (first, _), pairs in overlaps({"train": train, **others}).items():
        if first == "train":
            shared |= {source for source, _ in pairs}

    if not shared:
        return train

    log.warning(
        "%s: %d training images are in val or test too, under other names, and left out: %s",
        train.name,
        len(shared),
        ", ".join(sorted(map(str, shared))[:3]),
    )
    rest = [index for index, sample in enumerate(train.samples) if sample.source not in shared]
    if not rest:
        raise DataError(f"{train.name}: every training image is in another split too.")
    return train.subset(rest, shared_content_dropped=len(shared))
