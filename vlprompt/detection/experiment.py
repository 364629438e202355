"""Running a configuration: search concepts, and score them beside the class names on every test set."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.concepts.old_study import ConceptOutcome, Scores, search_all, write_outcome
from vlprompt.core.errors import BackboneError, DataError
from vlprompt.core.files import write_json
from vlprompt.detection import create_detector
from vlprompt.detection.base import Detector
from vlprompt.detection.config import DetectConfig, load_boxes
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.detection.search import class_vectors, search_concepts
from vlprompt.experiments.old_folder import open_folder

__all__ = ["run_detection"]

log = logging.getLogger("vlprompt.detection")
_KEYS = ("AP", "AP50")


def run_detection(config: DetectConfig, resume: bool = False, command: str = "") -> ConceptOutcome:
    """Search concepts with every number of images and seed, and score them.

    Args:
        config: See :meth:`DetectConfig.read`.
        resume: Keep cells that were finished before, continue an unfinished one.
        command: Shown in the report.

    Raises:
        VLPromptError: If anything the configuration names can't be had; finished cells are kept.
    """
    folder = open_folder(config, resume)
    session = _Session(config, folder, resume)
    names = session.score_names()
    rows: Scores = {} if names is None else {"class names": {k: [v] for k, v in names.items()}}
    history = search_all(rows, config.data.images, config.seeds, session.run_cell)
    facts = {
        "detector": session.detector.identity,
        "data": config.data.train,
        "seeds": list(config.seeds),
    }
    title = f"Concepts for {config.detector['name']} on {config.data.train}"
    label = next(iter(config.data.test))
    headline = (f"{label}/AP50", f"AP50 on {label}")
    return write_outcome(
        folder, rows, facts, title=title, headline=headline, history=history, command=command
    )


class _Session:
    """The cells of one run, sharing the detector and what it sees of the test images."""

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

    def run_cell(self, images: int | None, seed: int) -> dict[str, Any]:
        """Search and score, or return what a finished cell left behind."""
        place = self.folder / f"images{images or 'all'}-seed{seed}"
        if self.resume and (place / "cell.json").is_file():
            return json.loads((place / "cell.json").read_text(encoding="utf-8"))
        data = self.train.few(images, seed)
        options = self.config.train.model_copy(update={"seed": seed})
        search = self.config.search
        arguments: dict[str, Any] = {"length": search.length, "init": search.init, "resume": self.resume}
        first = search_concepts(self.detector, data, self.val, options=options, folder=place, **arguments)
        vectors = first.module.concepts().detach()
        first.module.as_concepts(data.classnames).save(place / "concepts.safetensors")
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
        cell = {"images": images, "seed": seed, "scores": scores, "history": history}
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
