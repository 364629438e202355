"""Protocols through the command line: what is scored, what it is called, and what one failure costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.classification.studies import run
from tests.data.layouts import make
from tests.experiments.foretold import check_foretold
from vlprompt.backbones import create_backbone
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data import load_card, load_dataset
from vlprompt.experiments.config import list_configs
from vlprompt.experiments.runner import RunOutcome

BASE = """
task: classification
name: test
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: coop, context_length: 2}}
data: {{name: scenes/kind}}
train: {{epochs: 1, lr: 0.05, batch_size: 16}}
"""
CROSS = (
    "protocol={name: cross-dataset, shots: [2], seeds: [1, 2], targets: [scenes/size, scenes/arrangement]}"
)
Train = Callable[..., tuple[RunOutcome, dict[str, Any]]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Run the configuration with overrides; return the outcome and metrics.json."""
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(output=tmp_path / "runs"))

    def run_with(*overrides: str, code: int = 0) -> tuple[RunOutcome, dict[str, Any]]:
        outcome = run(path, overrides)
        assert outcome.exit_code == code, outcome.failures
        if code == 0:
            check_foretold(outcome.folder)
        return outcome, json.loads((outcome.folder / "metrics.json").read_text())

    return run_with


def test_what_training_took_stands_beside_the_tables(tmp_path: Path) -> None:
    """Adapters and a head: the numbers that their definitions say, and the seconds that each cell's clock measured."""
    learner = "learner: {{name: coop, context_length: 2}}"
    methods = "methods: {{coop: {{context_length: 2}}, taskres: {{}}, zero_shot: {{}}}}"
    path = tmp_path / "run.yaml"
    path.write_text(BASE.replace(learner, methods).format(output=tmp_path / "runs"))
    outcome = run(path, ["data.name=[scenes/kind, scenes/size]", "protocol.shots=[2]", "protocol.seeds=[1]"])
    metrics = json.loads((outcome.folder / "metrics.json").read_text())

    names = {name: len(load_dataset(name).classnames) for name in ("scenes/kind", "scenes/size")}
    width = create_backbone("tiny", pretrained="random").dim

    timings = json.loads((outcome.folder / "timings.json").read_text())
    assert timings["coop, 2 shots"]["trainable"] == [2 * 128] * 2
    assert timings["taskres, 2 shots"]["trainable"] == [count * width for count in names.values()]
    assert timings["zero_shot, 2 shots"]["trainable"] == [0, 0]
    assert metrics["coop/shots2/train/trainable"] == 2 * 128

    seconds = [
        json.loads(file.read_text())["training"] for file in outcome.folder.glob("cells/coop*/timings.json")
    ]
    assert sorted(timings["coop, 2 shots"]["seconds"]) == sorted(seconds)
    low, high = sorted(count * width for count in names.values())
    assert f"| taskres, 2 shots | {low:,} to {high:,} |" in (outcome.folder / "timings.md").read_text()


def test_cross_dataset_trains_once_per_seed_and_keeps_finished_cells(train: Train, tmp_path: Path) -> None:
    outcome, metrics = train(CROSS)
    assert metrics["protocol"] == "cross-dataset"
    for key in ("source/score", "scenes/size/accuracy", "scenes/arrangement/zero_shot_score", "score_ci95"):
        assert key in metrics
    average = (metrics["scenes/size/score"] + metrics["scenes/arrangement/score"]) / 2
    assert metrics["score"] == metrics["accuracy"] == pytest.approx(average)
    assert metrics["targets"] == ["scenes/size", "scenes/arrangement"]
    assert metrics["runs"] == 6
    trained = sorted(path.parent.parent.name for path in outcome.folder.rglob("prompt.safetensors"))
    assert trained == ["coop_scenes-kind_2shots_seed1", "coop_scenes-kind_2shots_seed2"]
    table = (outcome.folder / "table.md").read_text().splitlines()
    assert table[0] == "| method (%) | scenes/kind (source) | scenes/size | scenes/arrangement | average |"

    # What finished is read, not run again: a changed file changes the figures.
    (outcome.folder / "done.json").unlink()
    for seed in (1, 2):
        name = f"coop_scenes-kind_2shots_seed{seed}_scenes-arrangement"
        cell = outcome.folder / "cells" / name / "cell.json"
        record = json.loads(cell.read_text())
        for line in record["measurements"]:
            if line["metric"] == "score":
                line["value"] = 0.75
        cell.write_text(json.dumps(record))
    assert train(CROSS)[1]["scenes/arrangement/score"] == 0.75


def test_a_target_is_asked_for_in_its_own_words(train: Train) -> None:
    """Untrained masks are zero-shot classification, with the target's templates instead of the source's."""
    _, metrics = train(CROSS, "learner={name: amt}", "train.epochs=0", "protocol.seeds=[1]")
    for target in ("scenes/size", "scenes/arrangement"):
        assert metrics[f"{target}/score"] == metrics[f"{target}/zero_shot_score"]


def test_domain_generalisation_over_styles(train: Train) -> None:
    styles = "targets: ['scenes/kind@sketch', 'scenes/kind@night']"
    _, metrics = train(f"protocol={{name: domain-generalisation, shots: [2], seeds: [1], {styles}}}")
    parts = [metrics[f"scenes/kind@{style}/score"] for style in ("sketch", "night")]
    assert metrics["score"] == pytest.approx(sum(parts) / 2)
    assert metrics["scenes/kind@sketch/classnames_hash"] == metrics["scenes/kind/classnames_hash"]


def test_one_bad_folder_costs_its_own_cells_only(train: Train, tmp_path: Path) -> None:
    """A run over several data sets finishes the others, tells the failure at the end and exits with 1."""
    bad = tmp_path / "nothing here"
    outcome, metrics = train(
        CROSS, f"protocol.targets=[scenes/size, 'folder:{bad}', scenes/arrangement]", code=1
    )
    assert metrics["runs_failed"] == 2
    assert "scenes/size/score" in metrics
    assert "scenes/arrangement/score" in metrics
    assert "score" not in metrics  # an average over fewer data sets is another number
    (failure,) = outcome.failures
    assert failure.startswith("coop_scenes-kind_2shots_seed1_folder-nothing-here-")
    assert "and 1 more" in failure
    assert str(bad) in failure
    assert "2 cells failed" in (outcome.folder / "table.md").read_text()


def test_a_bad_source_says_so(train: Train, tmp_path: Path) -> None:
    bad = tmp_path / "nothing here"
    with pytest.raises(DataError, match="there is no folder"):
        train(CROSS, f"data.name=folder:{bad}", "protocol.seeds=[1]")


def test_base_to_new_survives_one_bad_folder(train: Train, tmp_path: Path) -> None:
    names = f"data.name=[scenes/larger, 'folder:{tmp_path / 'nothing here'}']"
    outcome, metrics = train("protocol={name: base-to-new, shots: [2], seeds: [1]}", names, code=1)
    assert "scenes/larger/harmonic_mean" in metrics
    assert metrics["runs_failed"] == 1
    assert "there is no folder" in outcome.failures[0]


def test_elevater_draws_and_measures_as_the_benchmark_does(train: Train, tmp_path: Path) -> None:
    voc = load_card("elevater_voc-2007-classification")
    assert voc.source.otherwise is not None
    make(voc, voc.source.otherwise, tmp_path)
    bad = tmp_path / "nothing here"
    outcome, metrics = train(
        "protocol={name: elevater, shots: [2], seeds: [1]}",
        f"data={{name: [{voc.name}, digits, 'folder:{bad}'], root: '{tmp_path}'}}",
        "train.select=best",
        "train.select_metric=score",
        code=1,
    )
    assert metrics[f"{voc.name}/map_11_point_elevater"] == metrics[f"{voc.name}/score"] > 0
    assert metrics[f"{voc.name}/metric"] == "map_11_point_elevater"
    assert metrics["digits/accuracy"] == metrics["digits/score"]
    assert outcome.failures[0].startswith("coop_folder-nothing-here-")
    assert f"{voc.name} by map_11_point_elevater" in (outcome.folder / "table.md").read_text()
    assert len(outcome.results.select("val/score", data="digits", part="train")) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.name=cross-dataset"], "cross-dataset needs at least one data set to score"),
        (["protocol.targets=[digits]"], "only cross-dataset and domain-generalisation use it"),
        (
            ["protocol.name=cross-dataset", "data.name=digits", "protocol.targets=[digits]"],
            "digits is what cross-dataset trains on",
        ),
        (
            [CROSS, "protocol.targets=[digit]"],
            r"protocol\.targets: unknown data set 'digit'\. Did you mean 'digits'",
        ),
        (["protocol.name=elevater", "data.sampling=coop_compat"], "elevater draws in its own way"),
    ],
)
def test_mistakes_in_the_configuration(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("coop_tiny.yaml", overrides)


@pytest.mark.parametrize("name", [name for name in list_configs() if name.startswith("protocol_")])
def test_shipped_protocols_load(name: str) -> None:
    assert load_config(name).protocol.name in name.replace("_", "-")
