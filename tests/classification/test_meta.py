"""Meta-training as a run: what it writes, that a run starts from it, that a comparison can make it first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlprompt.classification.compare import Comparison, compare
from vlprompt.classification.config import load_config
from vlprompt.classification.experiment import run
from vlprompt.classification.gram import read_start
from vlprompt.core.errors import ConfigError

META = """
name: meta
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: coop, context_length: 2}}
train: {{epochs: 2, lr: 0.01, batch_size: 2, optimizer: adamw}}
protocol: {{name: meta, seeds: [1]}}
meta:
  pairs: scenes:60
  shard: 32
  clusters: {{domains: 3, classes: 4, drop_incoherent: 0.0}}
  episodes: {{ways: 3, support: 1, query: 1, per_epoch: 4, validation: 2, held_out: 0.0}}
  regulator: {{name: low_rank, rank: 2}}
"""
FEWSHOT = """
name: fewshot
output: {output}
backbone: {{name: tiny, pretrained: random}}
learner: {{name: coop, context_length: 2}}
data: {{name: scenes/kind, validate_on: none, cache_dir: {output}}}
train: {{epochs: 1, lr: 0.05, batch_size: 8}}
protocol: {{shots: [1], seeds: [1, 2]}}
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    for name, text in (("meta", META), ("fewshot", FEWSHOT)):
        (tmp_path / f"{name}.yaml").write_text(text.format(output=tmp_path / "runs"))
    return tmp_path


def test_a_meta_training_leaves_a_start_figures_and_a_sheet(configs: Path) -> None:
    outcome = run(load_config(configs / "meta.yaml"), command="as typed")
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert metrics["protocol"] == "meta"
    assert metrics["data"] == "scenes:60"
    for figure in ("accuracy", "plain_accuracy", "unadapted_accuracy", "zero_shot_accuracy"):
        assert 0 <= metrics[figure] <= 1
    start = read_start(f"gram:{outcome.folder}")
    assert start.facts["accuracy"] == metrics["accuracy"]
    assert start.regulator.options == {"rank": 2}
    clusters = json.loads((outcome.folder / "clusters.json").read_text())
    assert clusters["digest"] == start.facts["clusters"]
    assert "Clusters" in (outcome.folder / "clusters.html").read_text()
    assert "as typed" in (outcome.folder / "report.html").read_text()
    assert len((outcome.folder / "history.jsonl").read_text().splitlines()) == 2
    assert len(list(configs.glob("runs/pairs/*/shard-*.safetensors"))) == 2

    again = run(
        load_config(configs / "meta.yaml")
    )  # from nothing but the seed, and the features that are kept
    assert torch.equal(read_start(f"gram:{again.folder}").prompts["context"], start.prompts["context"])

    overrides = [f"train.init=gram:{configs}/runs/meta/*"]
    tuned = run(load_config(configs / "fewshot.yaml", overrides))
    assert tuned.failures == []
    assert tuned.metrics["init_checksum"] == start.checksum


def test_a_comparison_meta_trains_first_and_has_parts(configs: Path) -> None:
    text = f"""
name: all
output: {configs / "runs"}
before: {{start: {configs}/meta.yaml}}
runs:
  usual: {configs}/fewshot.yaml
  gram: "{configs}/fewshot.yaml train.init=gram:{configs}/runs/all/start/*"
  longer: "{configs}/fewshot.yaml train.epochs=2"
parts:
  few shots: []
  other tasks: [protocol.name=cross-dataset, "protocol.targets=[scenes/arrangement, scenes/size]"]
baseline: {{gram: usual, longer: gram}}
"""
    (configs / "all.yaml").write_text(text)
    outcome = compare(Comparison.read(configs / "all.yaml"))
    assert outcome.failures == []
    parts = outcome.text.split("## ")[1:]
    assert [p.splitlines()[0] for p in parts] == ["few shots", "other tasks"]
    for part, metric in zip(parts, ("accuracy", "score"), strict=True):
        assert part.index("Gain over usual") < part.index("Gain over gram")
        assert f"1-shot {metric}, seeds" in part
    folders = {
        json.loads(p.read_text())["protocol"]: p.parent for p in outcome.folder.glob("fewshot/*/metrics.json")
    }
    cells = json.loads((folders["cross-dataset"] / "cells.json").read_text())["cells"]
    assert len({(c["target"], c["seed"]) for c in cells}) == 6  # a source and two targets, two seeds
    assert (outcome.folder / "comparison-few-shots.csv").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["protocol.name=meta"], "meta.pairs: required by protocol.name=meta"),
        (["meta.pairs=scenes:5"], "meta.pairs: only protocol.name=meta uses it"),
        (["meta.regulator.name=diagnal"], "meta.regulator.name: unknown regulator 'diagnal'"),
        (["meta.regulator={name: low_rank, rnk: 2}"], "meta.regulator.rnk: unknown key; did you mean 'rank'"),
        (["meta.clusters.domain=3"], "meta.clusters.domain: unknown key; did you mean 'domains'"),
        (["train.init=runs/x"], "train.init: got 'runs/x'; write gram:PATH"),
        (["train.init=gram:x", "target.init_from=y"], "train.init: one start only"),
    ],
)
def test_mistakes_are_told_by_their_key(configs: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(configs / "fewshot.yaml", overrides)
    assert message in str(caught.value)


def test_a_baseline_that_is_no_row_is_refused(configs: Path) -> None:
    (configs / "all.yaml").write_text(f"runs: {{a: {configs}/fewshot.yaml}}\nbaseline: {{a: b}}\n")
    with pytest.raises(ConfigError, match="'b' is none of the runs: a"):
        Comparison.read(configs / "all.yaml")
