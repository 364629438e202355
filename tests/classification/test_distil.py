"""A teacher and images without labels as parts of a run: what trains on what, what the figures are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.classification.studies import run
from tests.data.folders import tree
from vlprompt.classification.config import ClassificationConfig
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import read_jsonl

RUN = """
task: classification
name: small
data: {name: "DATA", validate_on: none}
protocol: {name: base-to-new, shots: [1], seeds: [1, 2]}
before: {teacher: {learner: {name: coop, context_length: 4}, data: {name: "DATA", validate_on: none},
  protocol: {name: base-to-new, shots: [1], seeds: [1, 2]}, train: {epochs: 1, lr: 0.01}}}
methods:
  coop: {context_length: 4, train: {epochs: 1, lr: 0.01}}
  student: {name: promptkd, visual_depth: 1, distil: {teacher: teacher}, train: {steps: 2, lr: 0.001, batch_size: 8}}
"""


def test_a_run_whose_student_learns_from_a_run_before(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    data = tree(tmp_path / "data", "dog", "red circle", "hummingbird", "tulip", count=6)
    path.write_text(RUN.replace("DATA", data) + f"output: {tmp_path / 'runs'}\n", encoding="utf-8")
    outcome = run(path)
    assert not outcome.failures
    table = (outcome.folder / "table.md").read_text(encoding="utf-8")
    assert "| student (transductive) |" in table
    assert "| coop |" in table
    assert "student: transductive, learned from all training images without labels" in table

    record = (outcome.folder / "metrics.json").read_text(encoding="utf-8")
    assert "base-to-new, transductive" in record
    assert "20 unlabelled images" in record
    cell = next((outcome.folder / "cells").glob("student*seed2"))
    assert len(read_jsonl(cell / "history.jsonl")) == 1


@pytest.mark.parametrize(
    ("student", "reason"),
    [
        ("name: coop", "coop learns from labels, not from a teacher; use promptkd"),
        ("name: promptkd, train: {select: best}", "a student has no labelled images to choose an epoch by"),
        ("name: promptkd, train: {recipe: auto}", "no rate can be searched without labels"),
    ],
)
def test_what_contradicts_a_teacher(student: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "task: classification\nname: wrong\ntrain: {epochs: 1}\nmethods:\n"
        f"  it: {{{student}, distil: {{teacher: x}}}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match=reason):
        ClassificationConfig.read(path, [])


def test_data_without_a_teacher_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("task: classification\nname: wrong\ndistil: {data: digits}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"without distil\.teacher nothing reads it"):
        ClassificationConfig.read(path, [])
