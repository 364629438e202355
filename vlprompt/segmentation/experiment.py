"""Running a segmentation configuration: every model, strategy, data set, depth and seed; then tables and images.

A run lives in ``<output>/<name>/<id>/``; a finished cell is never run again on ``--resume``, an unfinished one
continues from its checkpoint, and one that fails stops no other.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.files import write_json
from vlprompt.core.options import options_model
from vlprompt.core.processes import accelerator
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation import MaskDataset, overlaps
from vlprompt.experiments.cells import Cell, ProtocolResult, run_cells
from vlprompt.experiments.old_folder import environment, failures, open_folder, write_history
from vlprompt.saved.prompts import save
from vlprompt.segmentation import STRATEGIES, Segmenter, create_segmenter
from vlprompt.segmentation.config import SegmentConfig
from vlprompt.segmentation.evaluate import evaluate_segmenter, load_trained
from vlprompt.segmentation.fit import check_phrases, fit_segmenter
from vlprompt.segmentation.tables import summary, write_results
from vlprompt.training.callbacks import Callback

__all__ = ["SegmentCell", "SegmentOutcome", "Session", "one_cell", "run_segmentation"]

log = logging.getLogger("vlprompt.segment")


@dataclass(frozen=True)
class SegmentCell(Cell):
    """One training run: a strategy of a model on a data set.

    Attributes:
        model: Label of the model.
        strategy: Label of the strategy.
        depth: Prompt depth, None for the strategy's own.
    """

    model: str = ""
    strategy: str = ""
    depth: int | None = None

    @property
    def name(self) -> str:
        """See :attr:`Cell.name`; shots are training images here, 0 stands for all."""
        images = f"{self.shots}images" if self.shots else "all"
        where = Cell(self.dataset, 0, self.seed).name.rpartition("_0shots")[0]
        depth = "" if self.depth is None else f"_depth{self.depth}"
        return f"{self.model}_{self.strategy}{depth}_{where}_{images}_seed{self.seed}"


@dataclass(frozen=True)
class SegmentOutcome:
    """What a run produced.

    Attributes:
        folder: Holds ``metrics.json``, ``cells.json``, ``results.md``, ``.csv``, ``.tex``, ``report.html``, images.
        metrics: The content of ``metrics.json``.
        table: The Markdown tables.
        failures: One sentence per reason for which cells failed.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str
    failures: list[str] = field(default_factory=list)


def run_segmentation(config: SegmentConfig, resume: bool = False, command: str = "") -> SegmentOutcome:
    """Carry a configuration out.

    Args:
        config: See :func:`vlprompt.segmentation.config.load_segment_config`.
        resume: Keep finished cells and continue an unfinished one; otherwise the folder is emptied first.
        command: Shown in the report.

    Raises:
        VLPromptError: If nothing finished, for one reason.
    """
    session = Session(config, open_folder(config, resume), resume)
    result = run_cells("segmentation", session.plan(), session.run_cell)
    if not result.cells and len({f.message for f in result.failures}) == 1:
        raise result.failures[0].error
    metrics = {
        **result.metrics,
        **summary(config, _by_place(result)),
        "protocol": "segmentation",
        "data": config.data.names,
        "images": config.data.images,
        "queries": config.data.queries,
        "seeds": config.seeds,
        **session.facts,
        **environment(),
    }
    write_json(session.folder / "metrics.json", metrics)
    write_json(session.folder / "cells.json", result.record())
    stopped = failures(result)
    table = write_results(session, _by_place(result), metrics, stopped, command)
    return SegmentOutcome(session.folder, metrics, table, stopped)


class Session:
    """The cells of one run; backbones, data sets and test figures of what isn't trained are shared.

    Args:
        config: The run.
        folder: Where it lives.
        resume: Whether to keep what is there.
    """

    def __init__(self, config: SegmentConfig, folder: Path, resume: bool = False) -> None:
        self.config, self.folder, self.resume = config, folder, resume
        self.facts: dict[str, Any] = {}
        self._backbones: dict[str, Backbone] = {}
        self._data: dict[tuple[str, str, int], MaskDataset] = {}

    def plan(self) -> list[SegmentCell]:
        """Return every cell; what learns nothing is run once, not for every seed and depth."""
        cells = []
        for dataset in self.config.data.names:
            for model, label in self.config.pairs():
                target = STRATEGIES.get(self.config.strategy(label).name).target
                learns = target.tunes != "nothing" or self.config.model(model).options.get("last_layer") in (
                    "new",
                    "tuned",
                )
                deep = "depth" in options_model(target).model_fields
                depths = self.config.depths if deep and self.config.depths else [None]
                for depth in depths:
                    for seed in self.config.seeds if learns else self.config.seeds[:1]:
                        cells.append(
                            SegmentCell(
                                dataset,
                                self.config.data.images or 0,
                                seed,
                                model=model,
                                strategy=label,
                                depth=depth,
                            )
                        )
        return cells

    def run_cell(self, cell: Cell) -> Mapping[str, float]:
        """Train and score one cell, or return what a finished one left behind."""
        assert isinstance(cell, SegmentCell)
        folder = self.cell_folder(cell)
        if (folder / "cell.json").is_file():
            return dict(json.loads((folder / "cell.json").read_text(encoding="utf-8")))
        segmenter = self.segmenter(cell).to(accelerator().device)
        test = self.data(cell.dataset, "test", cell.seed)
        check_phrases(segmenter, test)
        numbers = self.train(cell, segmenter, folder)
        found = evaluate_segmenter(
            segmenter, test, boundary=self.config.boundary, argmax=self.config.data.argmax
        )
        numbers |= {**found.metrics, "trainable": float(segmenter.num_trainable())}
        save(segmenter, folder / "prompt", {k: v for k, v in numbers.items() if "/" not in k})
        write_json(folder / "pairs.json", [vars(score) for score in found.pairs])
        write_json(folder / "cell.json", numbers)
        log.info("%s: Dice %.1f %%", cell.name, 100 * numbers["dice"])
        return numbers

    def train(
        self,
        cell: SegmentCell,
        segmenter: Segmenter,
        folder: Path | None,
        callbacks: Sequence[Callback] | None = None,
        **changes: Any,
    ) -> dict[str, float]:
        """Train a cell's model in place; return figures on validation data.

        Args:
            cell: What to train on.
            segmenter: What to train.
            folder: Where checkpoints go.
            callbacks: See :func:`fit_segmenter`.
            **changes: Training options other than the configuration's.
        """
        if not segmenter.num_trainable():
            return {}
        train, val = (self.data(cell.dataset, split, cell.seed) for split in ("train", "val"))
        log.info("%s: %d numbers learn from %d pairs", cell.name, segmenter.num_trainable(), len(train))
        fitted = fit_segmenter(
            segmenter,
            train,
            val,
            folder=folder,
            resume=self.resume,
            augmentation=self.config.data.augmentation,
            loss=self.config.loss,
            callbacks=callbacks,
            **{**self.config.train_options(cell.strategy, seed=cell.seed), **changes},
        )
        if folder is not None:
            write_history(folder / "history.jsonl", fitted.history)
        return {f"train/{k}": v for k, v in fitted.metrics.items() if not k.startswith("val/class/")}

    def segmenter(self, cell: SegmentCell, **changes: Any) -> Segmenter:
        """Build a cell's model, with other options than the configuration's if some are given."""
        model, strategy = self.config.model(cell.model), self.config.strategy(cell.strategy)
        options = {**strategy.options, **({} if cell.depth is None else {"depth": cell.depth}), **changes}
        fields = options_model(STRATEGIES.get(strategy.name).target).model_fields
        if "seed" in fields and "seed" not in options:
            options["seed"] = cell.seed
        backbone = self.backbone(cell.model)
        return create_segmenter(model.name, backbone, strategy.name, **{**model.options, **options})

    def backbone(self, model: str) -> Backbone:
        """Return a model's backbone, built once."""
        section = self.config.model(model).backbone
        key = section.model_dump_json()
        if key not in self._backbones:
            self._backbones[key] = create_backbone(section.name, **section.arguments())
        self.facts[f"backbone/{model}"] = self._backbones[key].fingerprint
        return self._backbones[key]

    def data(self, name: str, split: str, seed: int) -> MaskDataset:
        """Return one split of a data set, drawn by a seed; training images that are tested on too are left out."""
        drawn = {"train": self.config.data.images, "val": self.config.data.val_images}
        images = drawn.get(split, self.config.data.test_images)
        drawn_by = seed if images and split != "test" else 1  # every seed is tested on the same images
        key = (name, split, drawn_by)
        if key not in self._data:
            found = load_segmentation(name, split, images, drawn_by, **self.config.data.arguments())
            if split == "train":
                others = {s: self.data(name, s, seed) for s in ("val", "test")}
                found = _not_shared(found, others)
            self._data[key] = found
            self.facts |= {
                f"{name}/{split}/{k}": v for k, v in found.fingerprint().items() if split == "test"
            }
            notes = {
                k: v
                for k, v in found.info.items()
                if k in ("phrases_that_deny", "oracle_text", "split_source")
            }
            self.facts |= {f"{name}/{split}/{k}": v for k, v in notes.items() if v}
        return self._data[key]

    def cell_folder(self, cell: SegmentCell) -> Path:
        """Return where a cell lives."""
        return self.folder / "cells" / cell.name

    def trained(self, cell: SegmentCell) -> Segmenter:
        """Return a finished cell's model."""
        return load_trained(self.cell_folder(cell) / "prompt", self.backbone(cell.model))


def _not_shared(train: MaskDataset, others: Mapping[str, MaskDataset]) -> MaskDataset:
    """Leave out training images whose very pixels lie in another split under any name."""
    found = overlaps({"train": train, **others})
    shared = {first for (a, _), pairs in found.items() if a == "train" for first, _ in pairs}
    if not shared:
        return train
    log.warning(
        "%s: %d training images are in val or test too, under other names, and left out: %s",
        train.name, len(shared), ", ".join(map(str, list(shared)[:3])),
    )  # fmt: skip
    kept = [i for i, s in enumerate(train.samples) if s.source not in shared]
    if not kept:
        raise DataError(f"{train.name}: every training image is in another split too.")
    return train.subset(kept, shared_content_dropped=len(shared))


def _by_place(result: ProtocolResult) -> dict[SegmentCell, dict[str, float]]:
    return {c: numbers for c, numbers in result.cells.items() if isinstance(c, SegmentCell)}


def one_cell(
    config: SegmentConfig, model: str | None = None, strategy: str | None = None, data: str | None = None
) -> SegmentConfig:
    """Return a configuration of one model, strategy, data set and seed; the first ones (that learn) unless named.

    Raises:
        UnknownNameError: For a label that the configuration hasn't.
    """
    for what, value, known in (
        ("model", model, list(config.models)),
        ("strategy", strategy, list(config.strategies)),
    ):
        if value is not None and value not in known:
            raise UnknownNameError(f"{what} of {config.name}", value, known)
    pairs = [p for p in config.pairs() if model in (None, p[0]) and strategy in (None, p[1])]
    learning = [p for p in pairs if STRATEGIES.get(config.strategy(p[1]).name).target.tunes != "nothing"]
    if not pairs:
        raise DataError(f"{config.name} doesn't run {strategy} on {model}.")
    chosen = (learning or pairs)[0]
    mine = {k: v for k, v in config.models[chosen[0]].items() if k != "strategies"}
    return config.model_copy(
        update={
            "models": {chosen[0]: mine},
            "strategies": {chosen[1]: config.strategies[chosen[1]]},
            "data": config.data.model_copy(update={"names": [data or config.data.names[0]]}),
            "seeds": config.seeds[:1],
            "depths": [],
        }
    )
