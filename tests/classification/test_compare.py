"""Several methods in one table: what it says, and what a failing run costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlprompt.classification.compare import Comparison, compare
from vlprompt.core.errors import ConfigError

RUN = """
backbone: {name: tiny, pretrained: random}
learner: {name: coop, context_length: 2}
data: {name: [scenes/kind, scenes/arrangement], validate_on: none}
train: {epochs: 1, lr: 0.05, batch_size: 8}
protocol: {name: coop-fewshot, shots: [2], seeds: [1, 2]}
"""


def _write(folder: Path, runs: str, more: str = "") -> Path:
    (folder / "run.yaml").write_text(RUN)
    (folder / "all.yaml").write_text(
        f"name: all\noutput: {folder / 'runs'}\nruns:\n{runs.format(folder=folder)}\n{more}"
    )
    return folder / "all.yaml"


def test_a_table_holds_every_method_and_its_paired_gains(tmp_path: Path) -> None:
    cfg = _write(
        tmp_path,
        "  words: {folder}/run.yaml\n  frozen: {folder}/run.yaml train.epochs=0\n",
        "baseline: frozen\n",
    )
    outcome = compare(Comparison.read(cfg))
    assert outcome.failures == []
    for text in ("words 2", "frozen 2", "scenes/kind", "mean", "Gain over frozen", "2-shot accuracy, tasks"):
        assert text in outcome.text, outcome.text
    runs = [json.loads(p.read_text()) for p in sorted(outcome.folder.glob("*/*/metrics.json"))]
    assert len(runs) == 2
    gain = abs(runs[0]["shots2/accuracy"] - runs[1]["shots2/accuracy"])
    assert f"{100 * gain:.1f} ±" in outcome.text.split("Gain over")[1]
    assert {p.name for p in outcome.folder.glob("comparison.*")} == {
        f"comparison.{s}" for s in ("md", "csv", "tex")
    }


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    runs = "  good: {folder}/run.yaml\n  bad: {folder}/run.yaml data.name=folder:{folder}/nowhere\n"
    outcome = compare(Comparison.read(_write(tmp_path, runs)))
    assert "good 2" in outcome.text
    assert outcome.failures
    assert all(f.startswith("bad: ") and "nowhere" in f for f in outcome.failures)
    assert "and 1 more" in outcome.failures[0]  # two seeds, one reason


def test_mistakes_of_all_runs_are_told_before_the_first_one_starts(tmp_path: Path) -> None:
    runs = "  a: {folder}/run.yaml learner.contxt=3\n  b: {folder}/run.yaml train.epoch=2\n"
    comparison = Comparison.read(_write(tmp_path, runs))
    with pytest.raises(ConfigError) as caught:
        compare(comparison)
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "runs").exists()


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of the runs: a"):
        Comparison.read(_write(tmp_path, "  a: {folder}/run.yaml\n", "baseline: b\n"))


def test_overrides_of_the_command_line_reach_every_run(tmp_path: Path) -> None:
    cfg = _write(
        tmp_path,
        "  a: {folder}/run.yaml\n  b: {folder}/run.yaml train.lr=0.1\n",
        "shared: [train.epochs=3]\n",
    )
    configs = Comparison.read(cfg, ["train.lr=0.2"]).configs()
    assert {(c.train.lr, c.train.epochs) for c in configs.values()} == {(0.2, 3)}
