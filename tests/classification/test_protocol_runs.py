"""Protocols through the command line: what is scored, what it is called, and what one failure costs."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.layouts import make
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError
from vlprompt.data import load_card

ROOT = Path(__file__).parent.parent.parent
BASE = """
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
Train = Callable[..., tuple[dict, str]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run tools/train.py; return metrics.json and standard error."""
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(output=tmp_path / "runs"))

    def run(*overrides: str, code: int = 0) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", "--cfg", str(path), *overrides])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert ended.value.code == code, err[-3000:]
        assert "Traceback" not in err
        return json.loads((folder_of(tmp_path) / "metrics.json").read_text()), err

    return run


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs" / "test").iterdir()
    return folder


def test_cross_dataset_trains_once_per_seed_and_keeps_finished_cells(train: Train, tmp_path: Path) -> None:
    metrics, _ = train(CROSS)
    assert metrics["protocol"] == "cross-dataset"
    for key in ("source/score", "scenes/size/accuracy", "scenes/arrangement/zero_shot_score", "score_ci95"):
        assert key in metrics
    average = (metrics["scenes/size/score"] + metrics["scenes/arrangement/score"]) / 2
    assert metrics["score"] == metrics["accuracy"] == pytest.approx(average)
    assert metrics["targets"] == ["scenes/size", "scenes/arrangement"]
    assert metrics["runs"] == 6
    trained = sorted(p.parent.parent.name for p in folder_of(tmp_path).rglob("prompt.safetensors"))
    assert trained == ["scenes-kind_2shots_seed1", "scenes-kind_2shots_seed2"]
    table = (folder_of(tmp_path) / "table.md").read_text().splitlines()
    assert table[0] == "| method (%) | scenes/kind (source) | scenes/size | scenes/arrangement | average |"
    for seed in (1, 2):
        cell = (
            folder_of(tmp_path)
            / "cells"
            / f"scenes-kind_2shots_seed{seed}_on_scenes-arrangement"
            / "cell.json"
        )
        cell.write_text(json.dumps({**json.loads(cell.read_text()), "score": 0.75}))
    assert train(CROSS, "--resume")[0]["scenes/arrangement/score"] == 0.75


def test_a_target_is_asked_for_in_its_own_words(train: Train) -> None:
    """Untrained masks are zero-shot classification, with the target's templates instead of the source's."""
    metrics, _ = train(CROSS, "learner={name: amt}", "train.epochs=0", "protocol.seeds=[1]")
    for target in ("scenes/size", "scenes/arrangement"):
        assert metrics[f"{target}/score"] == metrics[f"{target}/zero_shot_score"]


def test_domain_generalisation_over_styles(train: Train) -> None:
    styles = "targets: ['scenes/kind@sketch', 'scenes/kind@night']"
    metrics, _ = train(f"protocol={{name: domain-generalisation, shots: [2], seeds: [1], {styles}}}")
    parts = [metrics[f"scenes/kind@{style}/score"] for style in ("sketch", "night")]
    assert metrics["score"] == pytest.approx(sum(parts) / 2)
    assert metrics["scenes/kind@sketch/classnames_hash"] == metrics["scenes/kind/classnames_hash"]


def test_one_bad_folder_costs_its_own_cells_only(train: Train, tmp_path: Path) -> None:
    """A run over several data sets finishes the others, tells the failure at the end and exits with 1."""
    bad = tmp_path / "nothing here"
    metrics, err = train(CROSS, f"protocol.targets=[scenes/size, 'folder:{bad}', scenes/arrangement]", code=1)
    assert metrics["runs_failed"] == 2
    assert "scenes/size/score" in metrics
    assert "scenes/arrangement/score" in metrics
    assert "score" not in metrics  # an average over fewer data sets is another number
    last = err.strip().splitlines()[-2:]
    assert all(line.startswith("failed: scenes-kind_2shots_seed") and str(bad) in line for line in last)
    assert "2 runs failed" in (folder_of(tmp_path) / "table.md").read_text()


def test_a_bad_source_says_so_and_why_the_rest_is_missing(train: Train, tmp_path: Path) -> None:
    bad = tmp_path / "nothing here"
    _, err = train(CROSS, f"data.name=folder:{bad}", "protocol.seeds=[1]", code=1)
    assert f"there is no folder {str(bad)!r}" in err
    assert "did not finish, so there is nothing to score on scenes/size" in err


def test_base_to_new_survives_one_bad_folder(train: Train, tmp_path: Path) -> None:
    names = f"data.name=[scenes/larger, 'folder:{tmp_path / 'nothing here'}']"
    metrics, err = train("protocol={name: base-to-new, shots: [2], seeds: [1]}", names, code=1)
    assert "scenes/larger/harmonic_mean" in metrics
    assert metrics["runs_failed"] == 1
    assert "there is no folder" in err


def test_elevater_draws_and_measures_as_the_benchmark_does(train: Train, tmp_path: Path) -> None:
    voc = load_card("elevater_voc-2007-classification")
    assert voc.source.otherwise is not None
    make(voc, voc.source.otherwise, tmp_path)
    bad = tmp_path / "nothing here"
    metrics, err = train(
        "protocol={name: elevater, shots: [2], seeds: [1]}",
        f"data={{name: [{voc.name}, digits, 'folder:{bad}'], root: '{tmp_path}'}}",
        "train.select=best",
        "train.select_metric=score",
        code=1,
    )
    assert metrics[f"{voc.name}/map_11_point"] == metrics[f"{voc.name}/score"] > 0
    assert metrics[f"{voc.name}/metric"] == "map_11_point"
    assert metrics["digits/accuracy"] == metrics["digits/score"]
    assert "failed: folder-nothing-here-" in err
    table = (folder_of(tmp_path) / "table.md").read_text()
    assert f"{voc.name} by map_11_point" in table
    cells = {c["dataset"]: c for c in json.loads((folder_of(tmp_path) / "cells.json").read_text())["cells"]}
    assert "train/val/score" in cells["digits"]["metrics"]


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


@pytest.mark.parametrize("name", [p.name for p in (ROOT / "configs").glob("protocol_*.yaml")])
def test_shipped_protocols_load(name: str) -> None:
    assert load_config(name).protocol.name in name.replace("_", "-")
