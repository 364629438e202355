"""Scoring on data with other classes than the learner's: fewer, one, permuted, in capitals, unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import vlprompt
from tests.commands import Command
from tests.data.folders import fill
from vlprompt.backbones import Backbone
from vlprompt.classification.label_space import fitting
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.learners import Learner

CLASSES = ("cat", "dog", "red fox")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in CLASSES:
        fill(tmp_path / "data" / name, 5)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """One that a saved learner is loaded with by name."""
    return vlprompt.create_backbone("tiny")


@pytest.fixture(scope="module")
def shared(backbone: Backbone) -> Learner:
    return vlprompt.create_learner("coop", backbone, CLASSES, context_length=4)


@pytest.fixture(scope="module")
def bound(backbone: Backbone) -> Learner:
    return vlprompt.create_learner("coop", backbone, CLASSES, context_length=4, class_specific=True)


def permuted(data: ImageDataset) -> ImageDataset:
    other = data.keep_classes([2, 0, 1])
    return replace(other, classnames=tuple(name.upper() for name in other.classnames))


def test_order_and_capitals_change_nothing(folder: Path, shared: Learner, bound: Learner) -> None:
    data = load_dataset(f"folder:{folder}", "all")
    for learner in (shared, bound):
        assert vlprompt.evaluate(learner, permuted(data)) == pytest.approx(vlprompt.evaluate(learner, data))
    same, moved = fitting(bound, permuted(data))
    assert same is bound
    assert moved.classnames == CLASSES


def test_training_follows_the_learners_order(folder: Path, backbone: Backbone) -> None:
    data = load_dataset(f"folder:{folder}", "all")
    weights = []
    for train in (data, permuted(data)):
        learner = vlprompt.create_learner("linear_probe", backbone, CLASSES)
        vlprompt.fit(learner, train)
        weights.append(vlprompt.evaluate(learner, data)["accuracy"])
    assert weights[0] == weights[1]


def test_fewer_classes_compete_with_all_of_the_learners(folder: Path, bound: Learner) -> None:
    data = load_dataset(f"folder:{folder}", "all")
    part = data.keep_classes([2])
    inside = [i for i, label in enumerate(data.labels) if label == 2]
    by_hand = vlprompt.evaluate(bound, data.subset(inside))
    assert vlprompt.evaluate(bound, part) == pytest.approx(by_hand)


def test_unknown_classes_are_named(folder: Path, shared: Learner, bound: Learner) -> None:
    fill(folder / "owl", 5)
    data = load_dataset(f"folder:{folder}", "all")
    for learner in (shared, bound):
        with pytest.raises(DataError, match=r"does not know 'owl'.*--label-space data"):
            vlprompt.evaluate(learner, data)
    learner, moved = fitting(shared, data)
    assert learner.classnames == moved.classnames == data.classnames


def evaluate(command: Command, learner: Learner, folder: Path, *words: str) -> dict[str, object]:
    vlprompt.save(learner, "saved")
    answer = command("evaluate", "saved", "--data", f"folder:{folder}", *words)
    assert answer.status == 0, answer.err
    return dict(json.loads(answer.out))


@pytest.mark.parametrize(("names", "count"), [(["cat"], 1), (["DOG", "cat"], 3), (list(CLASSES), 1)])
def test_the_command_scores_everything_and_says_of_what(
    command: Command, bound: Learner, tmp_path: Path, names: list[str], count: int
) -> None:
    for name in names:
        fill(tmp_path / "photos" / name, count)
    record = evaluate(command, bound, tmp_path / "photos", "--all")
    assert record["label_space"] == "learner"
    assert (record["images"], record["classes"]) == (len(names) * count, 3)
    assert record["images_per_class"] == dict.fromkeys(sorted(names), count)


def test_the_command_names_both_label_spaces(command: Command, shared: Learner, folder: Path) -> None:
    fill(folder / "owl", 5)
    vlprompt.save(shared, "saved")
    words = ("evaluate", "saved", "--data", f"folder:{folder}", "--all")
    answer = command(*words)
    assert answer.status == 2
    assert "knows 3 of its 4 classes" in answer.err
    record = json.loads(command(*words, "--label-space", "data").out)
    assert (record["classes"], record["images_per_class"]["owl"]) == (4, 5)
    assert command(*words, "--split", "test").status == 2


def test_names_of_a_bound_learner_in_another_order(command: Command, bound: Learner, folder: Path) -> None:
    vlprompt.save(bound, "saved")
    words = [word for name in ("Red Fox", "dog", "cat") for word in ("--class", name)]
    answer = command("predict", "saved", folder / "cat" / "000.png", *words)
    assert answer.status == 0, answer.err


# --- names that a text tower can't tell apart


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a" + " very" * 90 + " long cat", "a" + " very" * 90 + " long dog"], "reads 77 tokens"),
        (["cat", "\u00adcat"], "two classes are called"),
        (["cat", "CAT\u200b"], "two classes are called"),
        ("cat", "class names are a list"),
        ([1, 2], "a class name is text"),
        ([True, "cat"], "a truth value"),
    ],
)
def test_a_learner_refuses_names_it_can_not_tell_apart(
    backbone: Backbone, names: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        vlprompt.create_learner("zero_shot", backbone, names)  # type: ignore[arg-type]


def test_names_that_look_alike_but_are_read_differently(backbone: Backbone) -> None:
    learner = vlprompt.create_learner("zero_shot", backbone, ["H2O", "H\u2082O", "café", "cafe"])
    assert len(learner.classnames) == 4
