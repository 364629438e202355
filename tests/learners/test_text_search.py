"""The learner of readable templates: what it keeps, where it may be used, and that a run shows and repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.commands import Command
from vlprompt import create_adapter, create_learner, evaluate, fit, load_dataset, save
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import CheckpointError, ConfigError, UnknownNameError, VLPromptError
from vlprompt.core.template_files import read_templates
from vlprompt.data import ImageDataset
from vlprompt.learners.text_search import TextSearch
from vlprompt.saved.export import export
from vlprompt.saved.prompts import load

NAME = "scenes/pattern@sketch"
QUICK = {"steps": 3, "proposals": 6}


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def train() -> ImageDataset:
    return load_dataset(NAME, "train", shots=2, seed=1)


@pytest.fixture(scope="module")
def val() -> ImageDataset:
    return load_dataset(NAME, "val", shots=2, seed=1)


def _learner(tiny: Backbone, data: ImageDataset, **options: object) -> TextSearch:
    learner = create_learner("text_search", tiny, data.classnames, data.templates, **{**QUICK, **options})
    assert isinstance(learner, TextSearch)
    return learner


@pytest.fixture(scope="module")
def found(tiny: Backbone, train: ImageDataset, val: ImageDataset) -> TextSearch:
    learner = _learner(tiny, train)
    fit(learner, train, val, seed=1)
    return learner


def _bare(tiny: Backbone, data: ImageDataset, **options: object) -> tuple[TextSearch, dict[str, float]]:
    learner = _learner(tiny, data, **options)
    return learner, fit(learner, data, seed=1).metrics


def test_what_is_found_is_zero_shot_with_other_words(
    tiny: Backbone, found: TextSearch, val: ImageDataset
) -> None:
    (template,) = found.found_templates()
    plain = create_learner("zero_shot", tiny, val.classnames, [template])
    assert torch.equal(found.class_weights(), plain.class_weights())
    assert evaluate(found, val) == evaluate(plain, val)


@pytest.mark.parametrize("objective", ["cross_entropy", "accuracy"])
def test_it_is_never_worse_than_the_start_on_validation(
    objective: str, tiny: Backbone, train: ImageDataset, val: ImageDataset
) -> None:
    learner = _learner(tiny, train, objective=objective, steps=1)
    metrics = fit(learner, train, val, seed=1).metrics
    start = evaluate(create_learner("zero_shot", tiny, val.classnames, val.templates), val)
    key = "nll" if objective == "cross_entropy" else "accuracy"
    sign = -1 if objective == "cross_entropy" else 1
    assert sign * metrics[f"val/{key}"] >= sign * start[key] - 1e-6
    assert metrics["learned/start_val_accuracy"] == pytest.approx(start["accuracy"])
    assert metrics["learned/val_accuracy"] == pytest.approx(metrics["val/accuracy"])
    gap = metrics["learned/train_accuracy"] - metrics["learned/val_accuracy"]
    assert metrics["learned/train_val_gap"] == pytest.approx(gap)


def test_other_classes_get_the_same_templates(found: TextSearch, tiny: Backbone) -> None:
    other = found.with_classes(["lamp", "digit four"], ["hand-written {}."])
    expected = tiny.class_weights(["lamp", "digit four"], found.found_templates())
    assert torch.equal(other.class_weights(), expected)
    assert other.found_templates() == found.found_templates()  # not the hand-written ones of the new data


def test_it_is_saved_and_read_by_others(
    found: TextSearch, val: ImageDataset, tiny: Backbone, tmp_path: Path
) -> None:
    pixels = torch.stack([tiny.preprocess(val[i][0]) for i in range(3)])
    with torch.no_grad():
        expected = found.eval()(pixels)
    again = load(save(found, tmp_path / "prompt"), tiny)
    assert isinstance(again, TextSearch)
    assert again.found_templates() == found.found_templates()
    assert torch.equal(again(pixels), expected)

    adapter = create_adapter("tda", again)
    plain = create_adapter("tda", tiny, val.classnames, found.found_templates())
    for image in (val[0][0], val[1][0]):
        torch.testing.assert_close(adapter.predict([image]).probs, plain.predict([image]).probs)


@pytest.mark.slow
def test_it_is_exported(found: TextSearch, backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    learner = create_learner("text_search", backbone, ("dog", "cat"))
    learner.load_trainable_state(found.trainable_state())
    with torch.no_grad():
        expected = learner.eval()(images[:3])
    program = torch.export.load(export(learner, tmp_path / "model.pt2")).module()
    torch.testing.assert_close(program(images[:3]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("bytes_", "message"),
    [
        (b"no json", "holds no templates"),
        (b'{"a": 1}', "no list of texts"),
        (b'["no place"]', "exactly one {}"),
    ],
)
def test_a_state_that_is_no_text_is_refused(
    bytes_: bytes, message: str, tiny: Backbone, train: ImageDataset
) -> None:
    state: Tensor = torch.zeros(4096, dtype=torch.uint8)
    state[: len(bytes_)] = torch.tensor(list(bytes_), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        _learner(tiny, train).load_trainable_state({"found": state})


def test_several_templates_may_be_taken_together(
    tiny: Backbone, train: ImageDataset, val: ImageDataset
) -> None:
    learner = _learner(tiny, train, ensemble=4)
    fit(learner, train, val, seed=1)
    templates = learner.found_templates()
    assert 1 <= len(templates) <= 4
    assert torch.equal(learner.class_weights(), tiny.class_weights(train.classnames, templates))


def test_without_validation_data_it_warns(
    tiny: Backbone, train: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    _, metrics = _bare(tiny, train, steps=1)
    assert "there are no validation data" in caplog.text
    assert "learned/val_accuracy" not in metrics


def test_wrong_options_are_refused_before_anything_runs(tiny: Backbone, train: ImageDataset) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown proposer 'gramar'.*'grammar'"):
        _learner(tiny, train, proposer="gramar")
    with pytest.raises(ConfigError, match="fresh"):
        _learner(tiny, train, proposer_options={"fresh": 3})
    with pytest.raises(UnknownNameError, match="unknown describer"):
        _learner(tiny, train, describer="somebody")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_price": 1.0}, "max_price: nothing here has a price"),
        ({"describer_options": {"model": "m"}}, "describer_options: there is no describer"),
        (
            {"describer": "captions"},
            "the proposer 'grammar' reads no descriptions; chat, local, replay, retrieval do",
        ),
        ({"describer": "captions", "proposer": "policy"}, "the proposer 'policy' reads no descriptions"),
    ],
)
def test_options_without_effect_are_refused(
    tiny: Backbone, train: ImageDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _learner(tiny, train, **options)


def test_a_describer_needs_images(tiny: Backbone, train: ImageDataset) -> None:
    captions = {"captions": "scenes:60"}
    learner = _learner(tiny, train, describer="captions", proposer="retrieval", proposer_options=captions)
    with pytest.raises(VLPromptError, match="only embeddings were given"):
        learner.solve((torch.randn(4, tiny.dim), torch.tensor([0, 1, 2, 3])), None)
    fit(learner, train, seed=1)  # where they are, it works
    assert learner.found_templates()


def test_a_transcript_replays_in_another_learner(
    tiny: Backbone, train: ImageDataset, val: ImageDataset, tmp_path: Path
) -> None:
    learner = _learner(tiny, train)
    fit(learner, train, val, seed=1, folder=tmp_path / "run")
    transcript = tmp_path / "run" / "transcript.jsonl"
    last = json.loads(transcript.read_text().splitlines()[-1])
    assert last["templates"] == list(learner.found_templates())
    assert last["occlusion"]

    replay = _learner(tiny, train, proposer="replay", proposer_options={"path": str(transcript)})
    fit(replay, train, val, seed=1)
    assert replay.found_templates() == learner.found_templates()

    fewer = train.subset(range(len(train) - 1))
    with pytest.raises(CheckpointError, match="another scorer"):
        fit(
            _learner(tiny, train, proposer="replay", proposer_options={"path": str(transcript)}),
            fewer,
            val,
            seed=1,
        )


def test_a_killed_fit_goes_on(tiny: Backbone, train: ImageDataset, val: ImageDataset, tmp_path: Path) -> None:
    whole = _learner(tiny, train)
    fit(whole, train, val, seed=1, folder=tmp_path / "whole")
    lines = (tmp_path / "whole" / "transcript.jsonl").read_bytes().splitlines(keepends=True)

    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "transcript.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    part = _learner(tiny, train)
    fit(part, train, val, seed=1, folder=tmp_path / "part", resume=True)
    assert part.found_templates() == whole.found_templates()
    assert (tmp_path / "part" / "transcript.jsonl").read_bytes() == b"".join(lines)


def test_a_run_shows_what_was_found_and_another_reads_it(command: Command, tmp_path: Path) -> None:
    # Two classes of `kind` and few images: what is tested is what a run writes.
    short = ["data.name=scenes/kind", "protocol.shots=[1]", "protocol.seeds=[1]"]
    quick = ["learner.steps=2", "learner.proposals=4"]
    answer = command("run", "ipo_tiny.yaml", *short, *quick)
    assert answer.status == 0, answer.err
    (record,) = (tmp_path / "runs" / "ipo_tiny").glob("*/metrics.json")
    run = record.parent
    (cell,) = (run / "cells").iterdir()
    templates = read_templates(cell / "templates.txt")

    metrics = json.loads(record.read_text())
    assert metrics[f"{cell.name}/templates"] == list(templates)
    page = (run / "report.html").read_text()
    assert templates[0] in page
    assert "train - test" in page

    (tmp_path / "my words.txt").write_bytes((cell / "templates.txt").read_bytes())
    answer = command("run", "zero_shot_tiny.yaml", *short, "data.templates=file:my words.txt")
    assert answer.status == 0, answer.err
    (other,) = (tmp_path / "runs" / "zero_shot_tiny").glob("*/metrics.json")
    assert json.loads(other.read_text())["accuracy"] == metrics["accuracy"]
    assert (
        templates[0] in (other.parent / "config.yaml").read_text()
    )  # the sentence, not the file that may change

    answer = command("run", "zero_shot_tiny.yaml", *short, "data.templates=file:none.txt")
    assert answer.status == 2
    assert "data.templates: there is no file of templates" in answer.err
