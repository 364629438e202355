"""A cell of class-incremental learning: a course of sessions, each of which can be continued after a kill."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlprompt.classification.evaluate import predict_logits
from vlprompt.classification.fit import fit
from vlprompt.classification.protocols.class_incremental import FIXED, session_classes
from vlprompt.classification.study_cell import StudyCell
from vlprompt.core.errors import DataError
from vlprompt.core.files import read_jsonl, write_jsonl
from vlprompt.core.names import listed_names
from vlprompt.core.processes import process_state
from vlprompt.data import ImageDataset, Sample
from vlprompt.experiments.cell import Measurement
from vlprompt.learners import Learner, create_learner
from vlprompt.metrics.classification import compute
from vlprompt.metrics.incremental import backward_transfer, forgetting
from vlprompt.metrics.multi_label import best_cut, cf1, of1
from vlprompt.saved.prompts import load, save

__all__ = ["IncrementalCell", "check_sessions", "hidden_labels"]

log = logging.getLogger("vlprompt.run")

_DONE = "scores.jsonl"
_THRESHOLD = 0.8  # of published CF1 and OF1 (De Min et al.)


def hidden_labels(data: ImageDataset, session: Sequence[int]) -> ImageDataset:
    """Return what a session sees: the images that show one of its classes, with these labels and no others.

    Args:
        data: All images.
        session: Its classes among those of the data.
    """
    return data.keep_classes(session)


def check_sessions(data: Mapping[str, ImageDataset], sessions: Sequence[tuple[int, ...]]) -> None:
    """Refuse, before anything is learned, a session that nothing can be learned from or scored on.

    Args:
        data: The splits.
        sessions: Classes of every session.

    Raises:
        DataError: If no image of a split shows a class of a session.
    """
    for split, images in data.items():
        shown = {c for sample in images.samples for c in sample.classes}
        for number, session in enumerate(sessions, 1):
            if shown.isdisjoint(session):
                names = listed_names(images.classnames[c] for c in session)
                raise DataError(
                    f"{images.name}: no image of {split} shows a class of session {number} ({names}). Give these "
                    "classes images there, or cut the sessions otherwise: protocol.split, protocol.order, "
                    "protocol.seeds."
                )


@dataclass
class IncrementalCell(StudyCell):
    """Learns the sessions in turn; what each has learned and scored lies in its folder, ``session1`` and so on."""

    @property
    def is_single_task(self) -> bool:
        """See :attr:`StudyCell.is_single_task`: one page of predictions does not show a course of sessions."""
        return False

    def _run_task(self) -> None:
        """See :meth:`StudyCell.run`."""
        name = self.cell["data"]
        data = {split: self._load(name, split) for split in ("train", "test")}
        data["val"] = data["train"] if self.config.data.validate_on == "none" else self._load(name, "val")
        protocol = self.config.protocol
        sessions = session_classes(
            data["train"].classnames, protocol.split, protocol.order, self.cell["seed"], name
        )
        check_sessions(data, sessions)
        self.result.facts[f"{name}/metric"] = data["train"].info.get("metric", "accuracy")

        learner: Learner | None = None
        scores = _Scores(self, data["test"], data["val"], sessions)
        history: list[dict[str, Any]] = []
        for number in range(1, len(sessions) + 1):
            learner, records = self._session(number, sessions, learner, data, scores)
            history += [
                {"session": number, **record, "epoch": len(history) + i} for i, record in enumerate(records)
            ]

        assert learner is not None  # there is at least one session
        scores.conclude()
        self.result.measurements += scores.measurements
        if process_state().is_main_process:
            write_jsonl(self.folder / "history.jsonl", history)
        self._save(learner)

    def _session(
        self,
        number: int,
        sessions: Sequence[tuple[int, ...]],
        learner: Learner | None,
        data: dict[str, ImageDataset],
        scores: _Scores,
    ) -> tuple[Learner, list[dict[str, Any]]]:
        """Learn one session, or read what it left; return what can name all classes so far, and the epochs."""
        folder = self.folder / f"session{number}"
        finished = read_jsonl(folder / _DONE)
        if finished:
            scores.take(finished)
            return load(folder / "prompt", self.backbone), read_jsonl(folder / "history.jsonl")

        session = sessions[number - 1]
        part = hidden_labels(data["train"], session)
        if learner is None:
            student = self._learner(part.classnames, part.templates)
            self._start(student)
        else:
            student = learner.extend(part.classnames, part.templates)
        log.info(
            "session %d of %d: %d samples of %s", number, len(sessions), len(part), ", ".join(part.classnames)
        )

        val = None if self.config.data.validate_on == "none" else hidden_labels(data["val"], session)
        trained = fit(student, part, val, **{**self._fit_options(), "folder": folder})
        self.result.timings["training"] = (
            self.result.timings.get("training", 0.0) + trained.metrics["seconds"]
        )

        seen = [data["train"].classnames[c] for known in sessions[:number] for c in known]
        after = student.with_classes(seen, data["test"].templates)
        after.eval()
        measured = scores.measure(after, number)
        if process_state().is_main_process:
            save(after, folder / "prompt", {}, {**self.cell.where, "session": number})
            write_jsonl(folder / "history.jsonl", trained.history)
            write_jsonl(folder / _DONE, measured)  # the last file: the session is finished where it is there
        return after, trained.history


class _Scores:
    """What is measured after every session, on the same test images.

    Args:
        cell: Whose learners are scored.
        test: All test images.
        val: Validation images, which the threshold is chosen on.
        sessions: Classes of every session.
    """

    def __init__(
        self, cell: StudyCell, test: ImageDataset, val: ImageDataset, sessions: Sequence[tuple[int, ...]]
    ) -> None:
        order = [c for session in sessions for c in session]
        self.cell = cell
        self.sessions = sessions
        self.test = test.keep_classes(order)
        self.val = val.keep_classes(order)
        self.chooses = cell.config.data.validate_on != "none"
        self.several = test.multi_label
        self.measurements: list[Measurement] = []
        ends = torch.tensor([len(session) for session in sessions]).cumsum(0).tolist()
        self.columns = [slice(end - len(s), end) for end, s in zip(ends, sessions, strict=True)]

    def measure(self, learner: Learner, number: int) -> list[dict[str, Any]]:
        """Score what names the classes of the first ``number`` sessions; return the lines as JSON-able data."""
        logits, truth = self._predict(learner, self.test)
        names = learner.classnames
        zero_shot = create_learner("zero_shot", learner.backbone, names, self.test.templates)
        baseline, _ = self._predict(zero_shot, self.test)

        lines: list[dict[str, Any]] = []
        measure = "map" if self.several else "accuracy"
        for part, rows in self._parts(truth).items():
            where = {"session": number, **({"part": part} if part else {})}
            score = _score(logits[rows], truth[rows])
            numbers = {measure: score, "score": score, "zero_shot_score": _score(baseline[rows], truth[rows])}
            numbers |= self._f1(learner, logits[rows], truth[rows]) if self.several else {}
            lines += [{**where, "metric": metric, "value": value} for metric, value in numbers.items()]

            for of, columns in enumerate(self.columns[:number], 1):
                value = self._of_session(logits[rows], truth[rows], columns)
                lines.append({**where, "of": of, "metric": "score", "value": value})

        self.take(lines)
        return lines

    def take(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take in what :meth:`measure` returned, now or before a kill."""
        for line in lines:
            where = {key: value for key, value in line.items() if key not in ("metric", "value")}
            self.measurements.append(Measurement(line["metric"], line["value"], where))

    def conclude(self) -> None:
        """Add the figures of the whole course."""
        by_place = {
            (m.metric, m.where.get("part"), m.where["session"], m.where.get("of")): m.value
            for m in self.measurements
        }
        count = len(self.sessions)

        for part in (None, FIXED) if self.several else (None,):
            where = {"part": part} if part else {}
            reached = [[by_place["score", part, t, s] for s in range(1, t + 1)] for t in range(1, count + 1)]
            numbers = {"forgetting": forgetting(reached), "backward_transfer": backward_transfer(reached)}
            for prefix in ("", "zero_shot_"):
                scores = [by_place[f"{prefix}score", part, t, None] for t in range(1, count + 1)]
                numbers |= {f"{prefix}last": scores[-1], f"{prefix}average": sum(scores) / count}
            for metric in ("cf1", "of1", "cf1_chosen", "of1_chosen"):
                if (metric, part, count, None) in by_place:
                    numbers[metric] = by_place[metric, part, count, None]
            self.measurements += [Measurement(metric, value, where) for metric, value in numbers.items()]

    def _predict(self, learner: Learner, data: ImageDataset) -> tuple[Tensor, Tensor]:
        """Return (n, C) logits of all images, and their truth: (n, C), or (n,) with -1 for classes yet to come."""
        count = len(learner.classnames)
        samples = tuple(
            Sample(sample.source, 0) for sample in data.samples
        )  # a class yet to come has no label
        everything = replace(data, samples=samples, classnames=learner.classnames)
        logits, _ = predict_logits(learner, everything, cache=self.cell.test_cache(data.name, data.split))

        if self.several:
            return logits.double(), torch.from_numpy(data.multi_hot())[:, :count]
        labels = torch.tensor(data.labels)
        return logits.double(), labels.where(labels < count, -1)

    def _parts(self, truth: Tensor) -> dict[str, Tensor]:
        """Return the test images by part: those that show a class seen so far, and all of them."""
        shown = (truth > 0).any(1) if self.several else truth >= 0
        growing = shown.nonzero().flatten()
        return {"": growing, **({FIXED: torch.arange(len(truth))} if self.several else {})}

    def _f1(self, learner: Learner, logits: Tensor, truth: Tensor) -> dict[str, float]:
        """Return CF1 and OF1 at the published threshold, and at one that is chosen on validation images."""
        scores = learner.label_logits(logits)
        figures = {"cf1": cf1(scores, truth, _THRESHOLD), "of1": of1(scores, truth, _THRESHOLD)}
        if not self.chooses:
            return figures

        if self._chosen_for is not learner:
            val_logits, val_truth = self._predict(learner, self.val)
            rows = (val_truth > 0).any(1)
            self._cut = best_cut(learner.label_logits(val_logits[rows]), val_truth[rows])
            self._chosen_for = learner
        return figures | {
            "cf1_chosen": cf1(scores, truth, self._cut),
            "of1_chosen": of1(scores, truth, self._cut),
        }

    def _of_session(self, logits: Tensor, truth: Tensor, columns: slice) -> float:
        """Return the measure on one session's classes; single labels compete against all classes seen so far."""
        if self.several:
            return _score(logits[:, columns], truth[:, columns])
        rows = (truth >= columns.start) & (truth < columns.stop)
        return _score(logits[rows], truth[rows])

    _chosen_for: Learner | None = None
    _cut: float = 0.5


def _score(logits: Tensor, truth: Tensor) -> float:
    """Return mean average precision where images have several labels, else accuracy."""
    metric = "map" if truth.ndim == 2 else "accuracy"
    return compute(logits, truth, [metric])[metric]
