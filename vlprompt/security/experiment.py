"""Experiments of security: how well scanners find poisoned images, and what classifiers learn from what they clean."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from vlprompt.backbones import Backbone
from vlprompt.core.files import path_fingerprint, read_jsonl, write_jsonl
from vlprompt.data.fingerprint import data_fingerprint, missing_data
from vlprompt.experiments.backbone import backbone_sources, build_backbone, missing_backbone
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import parse_overrides
from vlprompt.experiments.experiment import Experiment, FinishedRun, joint_methods
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table
from vlprompt.metrics.backdoor import OBJECT_FIGURES, SCORE_FIGURES, scan_metrics, verdict_metrics
from vlprompt.security.config import SecurityConfig
from vlprompt.security.data import ScanData
from vlprompt.security.effect import attack_success, train_victim
from vlprompt.security.photographs import false_alarms
from vlprompt.security.scanners import SCANNERS, Scanner, create_scanner
from vlprompt.security.tables import SUSPECT, VICTIM, row_label, security_tables, summary
from vlprompt.security.victims import SuspectVerdicts, Training, training_set

__all__ = ["SecurityExperiment", "build"]

log = logging.getLogger("vlprompt.security")

_HISTORY = "history.jsonl"
_SUSPECT_FIGURES = ("fpr", "auroc", "tpr", "fpr_at_95_tpr")


def build(raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
    """Return the experiment that a configuration of this task describes (see :class:`Build`)."""
    content = parse_overrides(overrides, SecurityConfig)
    return SecurityExperiment(SecurityConfig.parse(raw, content, source))


class SecurityExperiment(Experiment):
    """Several scanners on the same images.

    A cell is a scanner (or the first one on a variant of its compositions), or a victim: a small classifier that is
    trained on the suspected set, as it is or as a scanner cleaned it.
    """

    config: SecurityConfig
    on_validation: ClassVar[tuple[str, ...]] = ("data.split=val",)

    def __init__(self, config: SecurityConfig) -> None:
        super().__init__(config)
        self._data: ScanData | None = None

    def cells(self) -> list[Cell]:
        """See :meth:`Experiment.cells`."""
        cells = []
        # All cells of one data set and seed follow each other: they share what is read and encoded.
        for name in self.config.data.names:
            for seed in self.config.protocol.seeds:
                for label in self.config.methods:
                    cells.append(Cell.at(method=label, data=name, seed=seed))
                cells += self._victims(name, seed)
                for variant in self.config.variants:
                    label = self.config.first_method
                    cells.append(Cell.at(method=label, variant=variant, data=name, seed=seed))

        return cells

    def run(self, cell: Cell, folder: Path) -> CellResult:
        """See :meth:`Experiment.run`."""
        if cell.get("stage") == VICTIM:
            return self._run_victim(cell, folder)
        return self._run_scanner(cell, folder)

    def sketch(self, cell: Cell) -> CellResult:
        """See :meth:`Experiment.sketch`."""
        result = CellResult()
        if cell.get("stage") == VICTIM:
            result.sketch(("accuracy", "attack_success", "images"))
            return result

        name, _ = self.config.method(cell["method"])
        kind = SCANNERS.get(name).target
        if not kind.needs_whole_set:
            figures = [*SCORE_FIGURES, "fpr/photographs", *(OBJECT_FIGURES if kind.names_objects else ())]
            if not self.config.varied(cell.get("variant")).unseen:
                figures = [figure for figure in figures if not figure.endswith("unseen")]
            result.sketch(figures)
        if self.config.suspect is not None and cell.get("variant") is None:
            result.sketch(_SUSPECT_FIGURES, part=SUSPECT)
        return result

    def layout(self) -> Layout:
        """See :meth:`Experiment.layout`."""
        name, _ = self.config.method(self.config.first_method)
        prefix = f"{SUSPECT}/" if SCANNERS.get(name).target.needs_whole_set else ""
        headline = f"{self.config.data.names[0]}/{self.config.first_method}/{prefix}auroc"
        return Layout(headline, "auroc", rows=("method", "variant"), baselines=self._baselines)

    def sources(self) -> dict[str, str]:
        """See :meth:`Experiment.sources`."""
        fingerprints = backbone_sources(self.config.backbone)
        for name in self.config.data.names:
            fingerprints[name] = data_fingerprint(name, self.config.data.root)
        photographs = self.config.data.photographs
        if photographs is not None:
            fingerprints[photographs] = path_fingerprint(photographs)
        return {name: fingerprint for name, fingerprint in fingerprints.items() if fingerprint}

    def missing(self) -> list[str]:
        """See :meth:`Experiment.missing`."""
        sentences = missing_backbone(self.config.backbone)
        photographs = self.config.data.photographs
        if photographs is not None and not Path(photographs).is_dir():
            sentences.append(f"data.photographs: there is no folder {photographs!r}.")
        for name in self.config.data.names:
            sentence = missing_data(name, self.config.data.root)
            if sentence is not None:
                sentences.append(sentence)
        return sentences

    def facts(self) -> dict[str, Any]:
        """See :meth:`Experiment.facts`."""
        return {
            "protocol": "scan",
            "data": self.config.data.names,
            "split": self.config.data.split,
            "seeds": self.config.protocol.seeds,
            "triggers": self.config.compositions.triggers,
        }

    def summary(self, results: Results) -> dict[str, float]:
        """See :meth:`Experiment.summary`."""
        return summary(results)

    def tables(self, results: Results) -> list[Table]:
        """See :meth:`Experiment.tables`: for each data set one of scanners, of triggers, of suspects and of victims."""
        return security_tables(results, self.config, self.layout())

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """See :meth:`Experiment.common_tables`: scanners and triggers of all runs."""
        configs = [run.experiment.config for run in runs]
        triggers: list[str] = []
        for config in configs:
            assert isinstance(config, SecurityConfig)
            triggers += config.compositions.triggers

        baseline = self.config.protocol.baseline
        label = None if baseline is None else runs[0].label(baseline)
        changes = {
            "compositions": self.config.compositions.model_copy(
                update={"triggers": list(dict.fromkeys(triggers))}
            ),
            "protocol": self.config.protocol.model_copy(update={"baseline": label}),
            "methods": joint_methods(runs),
        }
        return SecurityExperiment(self.config.model_copy(update=changes)).tables(results)

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """See :meth:`Experiment.page`: the AUROC of each method, and the learning curves of the last that has any."""
        name = self.config.data.names[0]
        seeds = len(self.config.protocol.seeds)
        plural = "s" if seeds > 1 else ""
        record.summary = (
            f"Scanners of poisoned images on {', '.join(self.config.data.names)}: {self.config.backbone.name}, "
            f"{self.config.data.split} split, {seeds} seed{plural}. Above: AUROC on {name}."
        )

        for label in self.config.methods:
            value = record.metrics.get(f"{name}/{label}/auroc")
            if value is not None:
                record.headline = {**record.headline, label: value}

        for cell in self.cells():
            path = folder / "cells" / cell.name / _HISTORY
            if path.is_file():
                record.history = read_jsonl(path)

    @cached_property
    def backbone(self) -> Backbone:
        """The frozen towers of all scanners."""
        backbone = build_backbone(self.config.backbone)
        return backbone.to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _baselines(self) -> dict[str, tuple[str, ...]]:
        baseline = self.config.protocol.baseline
        if baseline is None:
            return {}
        return {label: (baseline,) for label in self.config.methods if label != baseline}

    def _victims(self, name: str, seed: int) -> list[Cell]:
        """Return the cells of victims; those of cleaned sets need the verdicts of the scanner that cleans."""
        if self.config.suspect is None:
            return []

        trainings = [Training("poisoned")]

        for label in dict.fromkeys(self.config.suspect.cleaners):
            trainings.append(Training("cleaned", label))
            method, _ = self.config.method(label)
            if SCANNERS.get(method).target.names_objects:
                trainings.append(Training("mended", label))

        trainings += [Training("perfectly cleaned"), Training("clean")]

        cells = []

        for training in trainings:
            cleaner = Cell.at(method=training.cleaner, data=name, seed=seed)
            needs = () if training.cleaner is None else (cleaner.name,)
            cells.append(
                Cell.at(
                    needs, stage=VICTIM, part=training.part, method=training.cleaner, data=name, seed=seed
                )
            )

        return cells

    def _run_scanner(self, cell: Cell, folder: Path) -> CellResult:
        """Fit a scanner, and measure it on single images and on the suspected set."""
        data = self._scan_data(cell)
        result = CellResult()
        method, options = self.config.method(cell["method"])
        scanner = create_scanner(method, self.backbone, data.train.classnames, data.train.triggers, **options)
        result.facts |= {
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint,
        }

        started = time.perf_counter()
        scanner.fit(data.train, data.val, data.cache, data.seed, folder)
        result.timings["fit"] = time.perf_counter() - started
        if scanner.history:
            write_jsonl(folder / _HISTORY, scanner.history)

        if not scanner.needs_whole_set:
            verdicts = scanner.judge(scanner.rows(data.test, data.cache))
            result.add(verdict_metrics(verdicts, data.test, scanner.threshold))
            result.add({"fpr/photographs": false_alarms(scanner, self.config.data.photographs)})
        if data.suspect is not None:
            result.add(self._scan_suspects(scanner, data, folder), part=SUSPECT)
        return result

    def _scan_suspects(self, scanner: Scanner, data: ScanData, folder: Path) -> dict[str, float]:
        """Scan the suspected set, write the verdicts for the victims, and return the scanner's figures."""
        labels = torch.tensor(data.suspects.labels)
        verdicts = scanner.judge_set(scanner.rows(data.suspects, data.cache), labels)
        SuspectVerdicts.of(verdicts, scanner.threshold).write(folder)

        trigger = torch.tensor(data.suspects.targets["trigger"])
        if not bool((trigger > 0).any()):  # a rate of 0, or a set too small for one poisoned image
            return {}
        every = torch.ones(len(trigger), dtype=torch.bool)
        figures = scan_metrics(verdicts.score, trigger, every, scanner.threshold)
        # All compositions count as seen, so figures of seen and unseen ones would say the same or nothing.
        return {name: figures[name] for name in _SUSPECT_FIGURES}

    def _run_victim(self, cell: Cell, folder: Path) -> CellResult:
        """Train a victim, and measure what it learned of the images and of the attack."""
        assert self.config.suspect is not None
        data = self._scan_data(cell)
        training = Training(cell["part"], cell.get("method"))
        verdicts = None

        if training.cleaner is not None:
            cleaner = Cell.at(method=training.cleaner, data=data.name, seed=data.seed)
            verdicts = SuspectVerdicts.read(folder.parent / cleaner.name)

        pixels, labels = training_set(training, data, verdicts)
        log.info("%s: %d images", row_label(cell.where), len(labels))
        classes = len(data.test_images.classnames)
        victim = train_victim(pixels, labels, classes, epochs=self.config.suspect.epochs, seed=data.seed)
        result = CellResult()
        result.add(attack_success(victim, data.test_images, data.plan()))
        result.add({"images": float(len(labels))})

        return result

    def _scan_data(self, cell: Cell) -> ScanData:
        """Return the images of a cell. Only the last ones stay in memory, with their rows of the image tower."""
        variant = cell.get("variant")
        data = ScanData(
            cell["data"],
            cell["seed"],
            self.config.data,
            self.config.varied(variant),
            None if variant is not None else self.config.suspect,
        )
        if self._data is None or not self._data.is_same(data):
            self._data = data
        return self._data
