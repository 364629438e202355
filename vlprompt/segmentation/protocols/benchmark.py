"""Comparing methods: every method of every model on every data set, with every depth and seed.

What learns nothing runs once, not for every seed, depth and number of images.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json, write_jsonl, write_text
from vlprompt.core.options import options_model
from vlprompt.core.processes import process_state
from vlprompt.core.slugs import slug
from vlprompt.data.segmentation import MaskDataset, MaskedImage
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.experiment import FinishedRun, joint_methods
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table
from vlprompt.saved.prompts import save
from vlprompt.segmentation import STRATEGIES, Segmenter, tables
from vlprompt.segmentation.adapters import create_segmentation_adapter
from vlprompt.segmentation.evaluate import evaluate_segmenter, predict_mask
from vlprompt.segmentation.fit import check_phrases
from vlprompt.segmentation.overlays import Sheet
from vlprompt.segmentation.protocols.base import SegmentationExperiment, data_facts

__all__ = ["BenchmarkExperiment"]

log = logging.getLogger("vlprompt.run")

_OVERLAYS = "overlays"
_DEPTH_FIGURE = "dice-against-depth.svg"
_INSIDE = 255  # of a mask's file
_THRESHOLD = 0.5  # probability above which a pixel is inside


class BenchmarkExperiment(SegmentationExperiment):
    """A cell trains a method of a model on a data set and scores it on the test split."""

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        protocol = self.config.protocol
        cells = []

        for data in self.config.data.names:
            for model, method in self.config.pairs():
                if not self.config.learns(model, method):
                    cells.append(Cell.at(model=model, method=method, data=data, seed=protocol.seeds[0]))
                    continue
                for depth in self._depths(method):
                    for images in protocol.images:
                        for seed in protocol.seeds:
                            cells.append(
                                Cell.at(model=model, method=method, depth=depth, data=data, images=images, seed=seed)
                            )  # fmt: skip

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        result = CellResult()
        segmenter = self.segmenter(cell)
        result.facts[f"backbone/{cell['model']}"] = self.backbone(cell["model"]).fingerprint
        test = self.scored(cell)
        result.facts |= data_facts(cell["data"], test)
        check_phrases(segmenter, test)

        if segmenter.num_trainable():
            self._train(cell, segmenter, folder, result)
        adapt = dict(self.config.method(cell["method"]).adapt)
        tested = create_segmentation_adapter(adapt.pop("name"), segmenter, **adapt) if adapt else segmenter
        scores = evaluate_segmenter(
            tested, test, boundary=self.config.boundary, argmax=self.config.data.argmax
        )
        result.add({**scores.metrics, "trainable": segmenter.num_trainable()})
        log.info("%s: Dice %.1f %%", cell.name, 100 * scores.metrics["dice"])

        if process_state().is_main_process:
            numbers = {m.metric: m.value for m in result.measurements if "/" not in m.metric and not m.where}
            save(segmenter, folder / "prompt", numbers, cell.where)
            write_json(folder / "pairs.json", [vars(score) for score in scores.pairs])
            self._write_masks(tested, test, folder)
        return result

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        result.sketch(
            ("dice", "iou", "all_foreground_dice", "macro_dice", "macro_iou", "iou_dataset", "trainable")
        )
        result.sketch(("hd95",) if self.config.boundary else ())
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        return tables.layout(self.config, self.cells())

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`."""
        return tables.summary(self.config, results)

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`."""
        return tables.benchmark_tables(self.config, results, self.layout())

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """See :meth:`Experiment.common_tables`: models, methods, data sets and numbers of images of all runs."""
        models: dict[str, Any] = {}
        names: list[str] = []
        images: list[int | None] = []
        cells: list[Cell] = []

        for run in runs:
            experiment = run.experiment
            assert isinstance(experiment, BenchmarkExperiment)
            models = experiment.config.models | models
            names += experiment.config.data.names
            images += experiment.config.protocol.images
            cells += [cell.sibling(method=run.label(cell["method"])) for cell in experiment.cells()]

        baseline = self.config.protocol.baseline
        compared = {
            "images": list(dict.fromkeys(images)),
            "baseline": None if baseline is None else runs[0].label(baseline),
        }
        changes = {
            "data": self.config.data.model_copy(update={"name": list(dict.fromkeys(names))}),
            "protocol": self.config.protocol.model_copy(update=compared),
            "models": models,
            "methods": joint_methods(runs),
        }
        config = self.config.model_copy(update=changes)
        return tables.benchmark_tables(config, results, tables.layout(config, cells))

    def write_files(self, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.write_files`: a sheet of overlays for each model and data set, Dice against depth."""
        for name, sheet in self._sheets(folder / "cells").items():
            write_atomic(folder / _OVERLAYS / f"{name}.png", sheet.write)
        figure = tables.depth_figure(self.config, results)
        if figure:
            write_text(folder / _DEPTH_FIGURE, figure)

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`."""
        tables.describe(record, self.config, results)
        drawings: dict[str, tuple[str, str]] = {}

        if (folder / _DEPTH_FIGURE).is_file():
            drawing = (folder / _DEPTH_FIGURE).read_text(encoding="utf-8")
            drawings["Dice against depth"] = (tables.depth_caption(self.config), drawing)

        for path in sorted((folder / _OVERLAYS).glob("*.png")):
            text = "Image, true mask, and what each method finds (first seed)."
            drawings[f"Masks: {path.stem}"] = (text, Sheet.html(path))

        record.drawings = drawings

    def _depths(self, method: str) -> list[int | None]:
        """Return the depths that a method is compared at; None stands for the method's own."""
        strategy = STRATEGIES.get(self.config.method(method).name).target
        has_depth = "depth" in options_model(strategy).model_fields
        depths: list[int | None] = [*self.config.protocol.depths]
        return depths if has_depth and depths else [None]

    def _train(self, cell: Cell, segmenter: Segmenter, folder: Path, result: CellResult) -> None:
        trained = self.train(cell, segmenter, folder)
        for split in ("train", "val"):
            result.facts |= data_facts(cell["data"], self.data(cell, split))

        numbers = {key: value for key, value in trained.metrics.items() if not key.startswith("val/class/")}
        result.timings["training"] = numbers.pop("seconds")
        result.add(numbers, part="train")

        if process_state().is_main_process:
            write_jsonl(folder / "history.jsonl", trained.history)

    def _write_masks(self, segmenter: Segmenter, test: MaskDataset, folder: Path) -> None:
        """Write the predicted masks of the pairs that overlays show, as files of 0 and 255."""
        for number, index in enumerate(self._shown_pairs(test)):
            pair = test[index]
            inside = predict_mask(segmenter, pair.image, pair.phrase) > _THRESHOLD
            mask = Image.fromarray(inside.astype(np.uint8) * _INSIDE)
            write_atomic(folder / _OVERLAYS / f"{number}.png", partial(mask.save, format="PNG"))

    def _shown_pairs(self, test: MaskDataset) -> list[int]:
        """Return pairs at equal distances, not chosen by how well they turn out."""
        count = self.config.overlays
        if not count:
            return []
        step = max(1, len(test) // count)
        return list(range(0, len(test), step))[:count]

    def _sheets(self, folder: Path) -> dict[str, Sheet]:
        """Return the overlays of every model and data set by name, from the masks that finished cells wrote."""
        groups: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells():
            if self._is_drawn(cell) and (folder / cell.name / "cell.json").is_file():
                groups.setdefault((cell["model"], cell["data"]), []).append(cell)

        sheets = {}

        for (model, data), cells in groups.items():
            pairs = self._readable_pairs(cells[0])
            if not pairs:
                continue

            sheet = Sheet(pairs)

            for cell in cells:
                paths = [folder / cell.name / _OVERLAYS / f"{number}.png" for number in range(len(pairs))]
                sheet.add(cell["method"], paths)

            words = "".join(letter if letter.isalnum() else "-" for letter in data)[-100:]
            name = f"{slug(model)}-{words}"
            # Two names of data that differ in signs only must not share a file.
            sheets[f"{name}-{slug(data)}" if name in sheets else name] = sheet

        return sheets

    def _is_drawn(self, cell: Cell) -> bool:
        """Return whether overlays show a cell: the first seed, the most layers, the last number of images."""
        protocol = self.config.protocol
        learns = self.config.learns(cell["model"], cell["method"])
        return (
            cell["seed"] == protocol.seeds[0]
            and cell.get("depth") in (None, max(protocol.depths, default=None))
            and (not learns or cell.get("images") == protocol.images[-1])
        )

    def _readable_pairs(self, cell: Cell) -> list[MaskedImage]:
        try:
            test = self.scored(cell)
            return [test[index] for index in self._shown_pairs(test)]
        except DataError as error:  # images that went missing since must not cost the tables
            log.warning("no overlays of %s: %s", cell["data"], error)
            return []
