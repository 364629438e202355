"""Running a configuration: search concepts, and score them beside the class names on every test set."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.detection import create_detector
from vlprompt.detection.base import Detector
from vlprompt.detection.config import DetectConfig, load_boxes
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.detection.search import class_vectors, search_concepts
from vlprompt.errors import BackboneError, DataError
from vlprompt.evaluation.report import RunRecord, write_report
from vlprompt.evaluation.statistics import summarise
from vlprompt.evaluation.tables import Row, to_markdown
from vlprompt.files import write_json, write_text
from vlprompt.training.run import open_folder
from vlprompt.training.run_summary import environment

__all__ = ["DetectOutcome", "run_detection"]

log = logging.getLogger("vlprompt.detect")
_KEYS = ("AP", "AP50")


@dataclass(frozen=True)
class DetectOutcome:
    """What a run produced.

    Attributes:
        folder: Holds concept files, ``metrics.json``, ``results.md`` and the report.
        metrics: The content of ``metrics.json``.
        table: Markdown.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str


def run_detection(config: DetectConfig, resume: bool = False, command: str = "") -> DetectOutcome:
    """Search concepts with every number of pictures and seed, and score them.

    Args:
        config: See :meth:`DetectConfig.read`.
        resume: Keep cells that were finished before, continue an unfinished one.
        command: Shown in the report.

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished cells are kept.
    """
    folder = open_folder(config, resume)
    session = _Session(config, folder, resume)
    rows: dict[str, dict[str, list[float]]] = {}
    names = session.score_names()
    if names is not None:
        rows["class names"] = {k: [v] for k, v in names.items()}
    history: list[dict[str, Any]] = []
    for pictures in config.data.pictures:
        label = f"concepts, {pictures or 'all'} pictures"
        for seed in config.seeds:
            log.info("%s, seed %d", label, seed)
            cell = session.run_cell(pictures, seed)
            history = cell["history"]
            for stage, scores in cell["scores"].items():
                row = rows.setdefault(label if stage == "first" else f"{label}, second stage", {})
                for key, value in scores.items():
                    row.setdefault(key, []).append(value)
    return _write(config, folder, rows, history, command, session)


class _Session:
    """The cells of one run, sharing the detector and what it sees of the test pictures."""

    def __init__(self, config: DetectConfig, folder: Path, resume: bool) -> None:
        self.config, self.folder, self.resume = config, folder, resume
        self.detector: Detector = create_detector(str(config.detector["name"]), **config.detector_options)
        self.train = load_boxes(config.data.train, "train")
        self.val = None if config.data.val is None else load_boxes(config.data.val, "val")
        self.tests = {label: load_boxes(name, "test") for label, name in config.data.test.items()}
        for label, test in self.tests.items():
            if test.classnames != self.train.classnames:
                raise DataError(f"data.test.{label}: {test.name} has other classes than {self.train.name}.")
        self._rows: dict[str, dict[str, Tensor]] = {}

    def score_names(self) -> dict[str, float] | None:
        """Return the scores of the class names' own text features; None if names can't be read."""
        try:
            told = class_vectors(self.detector, self.train)
        except BackboneError as error:
            log.info("class names are left out: %s", error)
            return None
        return self._score(told)

    def run_cell(self, pictures: int | None, seed: int) -> dict[str, Any]:
        """Search and score, or return what a finished cell left behind."""
        place = self.folder / f"pictures{pictures or 'all'}-seed{seed}"
        if self.resume and (place / "cell.json").is_file():
            return json.loads((place / "cell.json").read_text(encoding="utf-8"))
        data = self.train.few(pictures, seed)
        options = self.config.train.model_copy(update={"seed": seed})
        search = self.config.search
        arguments: dict[str, Any] = {"length": search.length, "init": search.init, "resume": self.resume}
        first = search_concepts(self.detector, data, self.val, options=options, folder=place, **arguments)
        vectors = first.module.concepts().detach()
        first.module.found(data.classnames).save(place / "concepts.safetensors")
        scores = {"first": {**self._score(vectors), "seconds": first.seconds}}
        history = first.history
        if (second := self.config.second_stage) is not None:
            options = self.config.second_train().model_copy(update={"seed": seed})
            arguments |= {"unfreeze": second.unfreeze, "start": vectors, "folder": place / "second"}
            found = search_concepts(self.detector, data, self.val, options=options, **arguments)
            static = found.module.static
            after = self._score(found.module.concepts().detach(), keep=static)
            scores["second"] = {**after, "seconds": found.seconds}
            found.module.unfrozen.restore()
        cell = {"pictures": pictures, "seed": seed, "scores": scores, "history": history}
        write_json(place / "cell.json", cell)
        return cell

    def _score(self, concepts: Tensor, keep: bool = True) -> dict[str, float]:
        found: dict[str, float] = {}
        for label, test in self.tests.items():
            rows = self._kept(label, test) if keep else None
            scores = average_precision(self.detector, concepts, test, rows)
            found |= {f"{label}/{key}": scores[key] for key in _KEYS}
        return found

    def _kept(self, label: str, test: DetectionData) -> dict[str, Tensor]:
        if label not in self._rows:
            self._rows[label] = features(self.detector, test)
        return self._rows[label]


def _write(
    config: DetectConfig,
    folder: Path,
    rows: Mapping[str, Mapping[str, list[float]]],
    history: list[dict[str, Any]],
    command: str,
    session: _Session,
) -> DetectOutcome:
    """Write metrics, table and report."""
    found = {label: {k: summarise(v) for k, v in row.items()} for label, row in rows.items()}
    metrics: dict[str, Any] = {
        "detector": session.detector.identity,
        "data": config.data.train,
        "seeds": list(config.seeds),
        "threads": torch.get_num_threads(),
    }
    for label, row in found.items():
        for key, value in row.items():
            metrics |= value.flat(f"{label}/{key}")
    lines = [Row(label, {k: v for k, v in row.items() if k != "seconds"}) for label, row in found.items()]
    seconds = [f"{label}: {row['seconds'].mean:.1f} s" for label, row in found.items() if "seconds" in row]
    table = to_markdown(lines) + f"\nSearch, encoding of the pictures included: {'; '.join(seconds)}.\n"
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "results.md", table)
    label = next(iter(config.data.test))
    headline = {name: row[f"{label}/AP50"].mean for name, row in found.items()}
    record = RunRecord(
        title=f"Concepts for {config.detector['name']} on {config.data.train}",
        headline=headline,
        summary=f"AP50 on {label}; {len(config.seeds)} seeds.",
        history=history,
        metrics={k: v for k, v in metrics.items() if isinstance(v, float)},
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        command=command,
        environment=environment(),
    )
    write_report(folder / "report.html", record)
    return DetectOutcome(folder, metrics, table)
