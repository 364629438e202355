"""Class-incremental learning: the sessions, what is measured after each, and a course that is killed on its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tests.classification.studies import run
from tests.data.layouts import make
from tests.experiments.foretold import check_foretold
from vlprompt import load, load_dataset
from vlprompt.backbones import create_backbone
from vlprompt.classification.config import ClassificationConfig
from vlprompt.classification.evaluate import predict_logits
from vlprompt.classification.incremental import check_sessions
from vlprompt.classification.protocols.class_incremental import session_classes
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.files import read_tensors
from vlprompt.data import load_card
from vlprompt.training.callbacks import Callback, TrainingView

NAMES = tuple("kcebadfghijl")
VOC = "elevater_voc-2007-classification"
BASE = """
task: classification
name: test
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: {learner}}}
data: {{name: {data}, root: '{root}'}}
protocol: {{name: class-incremental, split: {split}, seeds: [1]}}
train: {{epochs: 2, lr: 0.01, optimizer: adam, batch_size: 8, checkpoint_seconds: 0}}
"""


class KilledError(RuntimeError):
    """Stands for a kill."""


class Killer(Callback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        """See :meth:`Callback.on_step`."""
        self.steps -= 1
        if self.steps == 0:
            raise KilledError


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = load_card(VOC)
    root = tmp_path_factory.mktemp("voc")
    make(card, card.source, root)
    return root


def written(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(BASE.format(output=folder / "runs", **values))
    return path


def content(folder: Path) -> dict[str, object]:
    """Return what a run left, but for what clocks wrote; headers of files of tensors are in no order."""
    names = ("results.jsonl", "metrics.json", "scores.jsonl", "history.jsonl")
    files: dict[str, object] = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.name in names
    }
    for path in folder.rglob("prompt.safetensors"):
        tensors, metadata = read_tensors(path)
        files[str(path.relative_to(folder))] = (
            {k: t.numpy().tobytes() for k, t in tensors.items()},
            metadata,
        )
    return files


def test_sessions_are_cut_as_the_papers_cut_them() -> None:
    def sizes(split: str, count: int = 12) -> list[int]:
        return [len(part) for part in session_classes(NAMES[:count], split, "alphabetical", 1, "x")]

    assert sizes("B0-C4") == [4, 4, 4]
    assert sizes("B6-C2") == [6, 2, 2, 2]
    assert sizes("B0-C5") == [5, 5, 2]
    assert sizes("joint") == [12]
    alphabetical = session_classes(NAMES, "B0-C4", "alphabetical", 1, "x")
    assert [NAMES[c] for c in alphabetical[0]] == list("abcd")
    with pytest.raises(DataError, match="B0-C5 cuts the 11 classes of x so that session 3 has 1"):
        sizes("B0-C5", 11)
    with pytest.raises(DataError, match="x has 12 classes, so that B12-C2 leaves none"):
        sizes("B12-C2")
    with pytest.raises(DataError, match="x has 3 classes, so that B0-C4 leaves none"):
        sizes("B0-C4", 3)


def test_a_session_that_no_image_shows_is_refused_before_anything_is_learned() -> None:
    data = {split: load_dataset("digits", split) for split in ("train", "test")}
    sessions = [(0, 1), (2, 3), (4, 5)]
    check_sessions(data, sessions)
    data["test"] = data["test"].subset(
        i for i, label in enumerate(data["test"].labels) if label not in (2, 3)
    )
    with pytest.raises(
        DataError, match=r"digits: no image of test shows a class of session 2 \('two', 'three'\)"
    ):
        check_sessions(data, sessions)


def test_every_seed_has_an_order_of_its_own() -> None:
    orders = [session_classes(NAMES, "B0-C4", "seeded", seed, "x") for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(c for part in orders[0] for c in part) == list(range(12))


@pytest.mark.parametrize("split", ["B0-C1", "B1-C2", "B0C4", "b0-c4", "4"])
def test_splits_that_mean_nothing(split: str) -> None:
    with pytest.raises(Exception, match="split"):
        ClassificationConfig.model_validate({"task": "classification", "protocol": {"split": split}})


def test_what_the_protocol_does_not_use_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, learner="coop", data="digits", root="", split="B0-C2")
    overrides = ["protocol.shots=[4]", "train.recipe=auto", "target.compare_scratch=true"]
    with pytest.raises(ConfigError) as caught:
        ClassificationConfig.read(path, overrides)
    for key in ("protocol.shots", "train.recipe", "target.compare_scratch"):
        assert f"{key}: class-incremental does not use it" in str(caught.value)


def test_figures_are_those_of_brute_force(voc: Path, tmp_path: Path) -> None:
    """Growing and fixed test sets, the matrix of sessions and what follows from it, from the saved prompts alone."""
    outcome = run(written(tmp_path, learner="session_probe", data=VOC, root=voc, split="B8-C6"))
    check_foretold(outcome.folder)
    cell = next((outcome.folder / "cells").iterdir())
    backbone = create_backbone("tiny", "random")
    test = load_dataset(VOC, "test", root=voc)
    truth = test.multi_hot()
    lines = [json.loads(line) for line in (outcome.folder / "results.jsonl").read_text().splitlines()]

    def value(metric: str, **where: Any) -> float:
        keys = ("session", "part", "of")
        found = [x for x in lines if x["metric"] == metric and all(x.get(k) == where.get(k) for k in keys)]
        assert len(found) == 1
        return float(found[0]["value"])

    def mean_ap(logits: np.ndarray[Any, Any], rows: Any, columns: list[int], labels: list[int]) -> float:
        pairs = [(truth[rows][:, c], logits[rows][:, j]) for j, c in zip(columns, labels, strict=True)]
        return float(np.mean([average_precision_score(y, x) for y, x in pairs]))

    seen: list[int] = []
    reached: list[list[float]] = []
    sessions = session_classes(test.classnames, "B8-C6", "seeded", 1, VOC)
    for number, session in enumerate(sessions, 1):
        seen += session
        learner = load(cell / f"session{number}" / "prompt", backbone)
        assert learner.classnames == tuple(test.classnames[c] for c in seen)
        whole = learner.classnames
        logits = predict_logits(learner, test.keep_classes(seen))[0].numpy()
        growing = truth[:, seen].any(1)
        everything = np.zeros((len(test), len(whole)))
        everything[growing] = logits
        score = mean_ap(everything, growing, list(range(len(seen))), seen)
        assert (
            value("score", session=number) == value("map", session=number) == pytest.approx(score, abs=1e-6)
        )
        row = [
            mean_ap(everything, growing, [seen.index(c) for c in part], list(part))
            for part in sessions[:number]
        ]
        assert [value("score", session=number, of=s) for s in range(1, number + 1)] == pytest.approx(
            row, abs=1e-6
        )
        reached.append(row)

    assert value("last") == value("score", session=3)
    assert value("average") == pytest.approx(np.mean([value("score", session=t) for t in (1, 2, 3)]))
    lost = [max(reached[0][0], reached[1][0]) - reached[2][0], reached[1][1] - reached[2][1]]
    assert value("forgetting") == pytest.approx(np.mean(lost), abs=1e-6)
    # On the fixed test images a probe of a session never changes.
    assert value("forgetting", part="fixed") == value("backward_transfer", part="fixed") == 0


@pytest.mark.parametrize(
    "learner",
    [
        "multi_lane, selectors: 2, prompts: 2",
        pytest.param("vpt, visual_length: 2", marks=pytest.mark.slow),
    ],
)
def test_a_course_that_was_killed_ends_with_the_same_files(voc: Path, tmp_path: Path, learner: str) -> None:
    """Killed inside the first session, then inside the second, where one session is finished."""
    values = {"learner": learner, "data": VOC, "root": voc, "split": "B0-C10"}
    whole = run(written(tmp_path / "whole", **values))
    path = written(tmp_path / "killed", **values)
    steps = sum(1 for _ in load_dataset(VOC, "train", root=voc).samples) // 8
    for kill_after in (3, steps + 2):
        with pytest.raises(KilledError):
            run(path, callbacks=[Killer(kill_after)])
    again = run(path)
    assert content(again.folder) == content(whole.folder)
    assert len(content(whole.folder)) >= 8


@pytest.mark.slow
def test_single_labels_compete_against_all_classes_so_far(tmp_path: Path) -> None:
    """Accuracy of digits, by a learner of no session: only the classes seen so far are asked for."""
    outcome = run(written(tmp_path, learner="zero_shot", data="digits", root="", split="B0-C5"))
    backbone = create_backbone("tiny", "random")
    test = load_dataset("digits", "test")
    first, _ = session_classes(test.classnames, "B0-C5", "seeded", 1, "digits")
    learner = load(next((outcome.folder / "cells").iterdir()) / "prompt", backbone)
    logits, labels = predict_logits(learner, test)
    assert learner.classnames[:5] == tuple(test.classnames[c] for c in first)
    right = logits.argmax(1) == labels
    metrics = outcome.metrics
    assert metrics["last"] == metrics["zero_shot_last"] == pytest.approx(float(right.float().mean()))
    rows = labels < len(first)  # labels are the learner's, in the order of the sessions
    hits = logits[rows, : len(first)].argmax(1) == labels[rows]
    assert metrics["session1/score"] == pytest.approx(float(hits.float().mean()))
    assert metrics["forgetting"] == pytest.approx(float(hits.float().mean() - right[rows].float().mean()))
    assert "fixed/last" not in metrics
    assert "| digits last |" in (outcome.folder / "table.md").read_text()
