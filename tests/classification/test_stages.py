"""Whole runs of several stages: what they train, from what, and that a repeated command repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.classification.studies import run
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import read_tensors
from vlprompt.experiments.gains import paired_gains
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.runner import RunOutcome

BASE = """
task: classification
name: stages
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: mvlpt, family: coop, context_length: 2}}
data: {{name: [scenes/arrangement, scenes/kind], validate_on: none, cache_dir: "{features}"}}
train: {{epochs: 2, lr: 0.02, batch_size: 8}}
"""


def _run(folder: Path, text: str, *overrides: str) -> RunOutcome:
    path = folder / "run.yaml"
    path.write_text(BASE.format(output=folder / "runs", features=folder.parent / "features") + text)
    return run(path, overrides)


def _prompt(outcome: RunOutcome, cell: str) -> dict[str, torch.Tensor]:
    return read_tensors(outcome.folder / "cells" / cell / "prompt" / "prompt.safetensors")[0]


MULTITASK = """
protocol: {name: multitask, shots: [2], seeds: [1, 2]}
target: {names: [scenes/size], shots: [1], compare_scratch: true}
"""


def test_targets_start_from_the_mean_of_the_sources_and_scratch_does_not(tmp_path: Path) -> None:
    outcome = _run(tmp_path, MULTITASK, "train.epochs=0")
    assert outcome.failures == []
    sources = [_prompt(outcome, f"mvlpt_source_source_2shots_seed{s}")["context"] for s in (1, 2)]
    mean = torch.stack(sources).mean(0)
    for seed in (1, 2):  # without training a target is what it started from
        target = _prompt(outcome, f"mvlpt_target_scenes-size_1shots_seed{seed}")["context"]
        torch.testing.assert_close(target, mean)
        scratch = _prompt(outcome, f"mvlpt_scratch_scenes-size_1shots_seed{seed}")["context"]
        assert torch.equal(scratch, sources[seed - 1])
    start = json.loads(
        (outcome.folder / "cells/mvlpt_target_scenes-size_1shots_seed1/start.json").read_text()
    )
    assert start["init_mean_of"] == 2
    assert outcome.metrics["target_start"] == "mean of the source prompts of this run"

    own = _run(tmp_path, MULTITASK, "train.epochs=0", "target.start=seed")
    assert torch.equal(_prompt(own, "mvlpt_target_scenes-size_1shots_seed2")["context"], sources[1])


def test_a_repeated_command_keeps_finished_cells_and_trains_what_is_missing(tmp_path: Path) -> None:
    first = _run(tmp_path, MULTITASK)
    metrics = first.metrics
    assert metrics["runs"] == 6
    assert {
        "accuracy",
        "source/accuracy",
        "source/scenes/arrangement/accuracy",
        "scratch/accuracy",
        "gain/shots1/accuracy_ci95",
        "gain_over_tasks/shots1/accuracy",
        "zero_shot_accuracy",
    } <= set(metrics)
    expected = metrics["shots1/accuracy"] - metrics["scratch/shots1/accuracy"]
    assert metrics["gain/shots1/accuracy"] == pytest.approx(expected)
    tasks = [metrics[f"source/scenes/{t}/accuracy"] for t in ("arrangement", "kind")]
    assert metrics["source/accuracy"] == pytest.approx(sum(tasks) / 2)

    cells = first.folder / "cells"
    gone = cells / "mvlpt_target_scenes-size_1shots_seed2"
    before = read_tensors(gone / "prompt" / "prompt.safetensors")[0]
    times = {p: p.stat().st_mtime_ns for p in cells.glob("*/cell.json") if p.parent != gone}
    (gone / "cell.json").unlink()
    (first.folder / "done.json").unlink()
    again = _run(tmp_path, MULTITASK)
    assert times == {p: p.stat().st_mtime_ns for p in times}
    assert torch.equal(before["context"], _prompt(again, gone.name)["context"])
    assert again.metrics["accuracy"] == metrics["accuracy"]


def test_groups_are_compared_with_each_task_alone(tmp_path: Path) -> None:
    outcome = _run(
        tmp_path,
        "protocol: {name: multitask, shots: [1], seeds: [1]}\n"
        "multitask: {groups: {both: [scenes/arrangement, scenes/kind], one: [scenes/kind]}}\n"
        "target: {compare_scratch: true}",
    )
    metrics = outcome.metrics
    alone = metrics["scratch/scenes/kind/shots1/accuracy"]
    together = metrics["both/shots1/scenes/kind/accuracy"]
    assert metrics["both/gain/scenes/kind/shots1/accuracy"] == pytest.approx(together - alone)
    assert "one/gain/shots1/accuracy" in metrics


def test_saved_prompts_start_an_ordinary_run_beside_scratch(tmp_path: Path) -> None:
    source = _run(tmp_path, "protocol: {name: multitask, shots: [2], seeds: [1, 2]}", "train.epochs=0")
    text = "protocol: {name: coop-fewshot, shots: [1], seeds: [1]}"
    options = (
        f"target.init_from={source.folder}/cells/mvlpt_source_*",
        "target.compare_scratch=true",
        "data.name=scenes/size",
        "train.epochs=0",
    )
    outcome = _run(tmp_path, text, *options)
    sources = [_prompt(source, f"mvlpt_source_source_2shots_seed{s}")["context"] for s in (1, 2)]
    got = _prompt(outcome, "mvlpt_scenes-size_1shots_seed1")["context"]
    torch.testing.assert_close(got, torch.stack(sources).mean(0))
    assert outcome.metrics["init_mean_of"] == 2
    assert "gain/shots1/accuracy" in outcome.metrics
    mismatch = _run(tmp_path, text, *options, "learner.position=end")
    assert mismatch.metrics["runs_failed"] == 1  # scratch runs, the other is refused
    assert "option position is 'middle' there and 'end' here" in mismatch.failures[0]


def test_the_transfer_study_writes_a_matrix_an_image_and_continues(tmp_path: Path) -> None:
    text = "protocol: {name: transfer, shots: [1], seeds: [1]}"
    outcome = _run(tmp_path, text)
    assert outcome.metrics["runs"] == 2 + 4
    record = json.loads((outcome.folder / "transfer.json").read_text())
    scratch = [outcome.metrics[f"scratch/scenes/{t}/shots1/accuracy"] for t in ("arrangement", "kind")]
    assert record["scratch_accuracy"] == pytest.approx(scratch)
    moved = outcome.metrics["from-scenes-arrangement/scenes/kind/shots1/accuracy"]
    expected = 100 * (moved - scratch[1]) / scratch[1]
    assert record["relative_gain_percent"][0][1] == pytest.approx(expected)
    assert (outcome.folder / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert "What helps what" in (outcome.folder / "report.html").read_text()
    start = json.loads(
        (
            outcome.folder / "cells/mvlpt_1shots_from_scenes-arrangement_scenes-kind_seed1/start.json"
        ).read_text()
    )
    assert start["init_from"] == [
        str(outcome.folder / "cells/mvlpt_1shots_scratch_scenes-arrangement_seed1/prompt")
    ]

    (outcome.folder / "cells/mvlpt_1shots_from_scenes-arrangement_scenes-kind_seed1/cell.json").unlink()
    (outcome.folder / "done.json").unlink()
    kept = outcome.folder / "cells/mvlpt_1shots_from_scenes-kind_scenes-kind_seed1/cell.json"
    time = kept.stat().st_mtime_ns
    assert _run(tmp_path, text).metrics["mean_gain_accuracy"] == pytest.approx(
        outcome.metrics["mean_gain_accuracy"]
    )
    assert kept.stat().st_mtime_ns == time


def test_gains_are_paired_by_task_and_seed() -> None:
    def lines(values: dict[tuple[str, int], float]) -> Results:
        return Results(
            Line({"data": task, "shots": 1, "seed": seed}, "accuracy", value)
            for (task, seed), value in values.items()
        )

    ours = lines({("a", 1): 0.5, ("b", 1): 0.7, ("a", 2): 0.6, ("b", 2): 0.9, ("a", 3): 1.0})
    theirs = lines({("a", 1): 0.4, ("b", 1): 0.5, ("a", 2): 0.6, ("b", 2): 0.6, ("a", 3): 0.0})
    gains = paired_gains(ours, theirs, "accuracy")
    assert gains["gain/shots1/accuracy"] == pytest.approx(0.15)  # seed 3 lacks task b
    assert gains["gain/a/shots1/accuracy"] == pytest.approx(0.05)
    assert gains["gain/b/shots1/accuracy"] == pytest.approx(0.25)
    assert gains["gain/shots1/accuracy_std"] == pytest.approx(0)
    assert gains["gain_over_tasks/shots1/accuracy_std"] == pytest.approx(0.2 / 2**0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.names=[scenes/shape]"], "target.names: only protocol.name=multitask uses it"),
        (["protocol.name=multitask", "multitask.groups={a: [scenes/shap]}"], "unknown data set of data.name"),
        (
            ["protocol.name=transfer", "protocol.shots=[1,2]"],
            "at least two data sets and one number of shots",
        ),
        (["target.compare_scratch=true"], "everything starts from scratch"),
        (["protocol.name=multitask", "target.names=[scenes/shap]"], "Did you mean 'scenes/shape'"),
        (["multitask.label_space=both"], "multitask.label_space"),
        (["multitask.alpha=2"], "multitask.alpha"),
    ],
)
def test_what_makes_no_sense_together_is_refused(overrides: list[Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(BASE.format(output=tmp_path, features=tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", overrides)
    assert message in str(caught.value)
