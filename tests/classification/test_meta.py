"""Meta-training as a run: what it writes, that a run starts from it, that a comparison can make it first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.classification.studies import run
from tests.experiments.foretold import check_foretold
from vlprompt.classification.config import load_config
from vlprompt.core.errors import ConfigError
from vlprompt.meta.start import read_start

META = """
task: classification
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
task: classification
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
    outcome = run(configs / "meta.yaml", command="as typed")
    check_foretold(outcome.folder)
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert metrics["protocol"] == "meta"
    assert metrics["data"] == "scenes:60"
    for figure in ("accuracy", "plain_accuracy", "unadapted_accuracy", "zero_shot_accuracy"):
        assert 0 <= metrics[figure] <= 1
    (cell,) = (outcome.folder / "cells").iterdir()
    start = read_start(f"gram:{outcome.folder}")
    assert start.facts["accuracy"] == metrics["accuracy"]
    assert start.regulator.options == {"rank": 2}
    clusters = json.loads((cell / "clusters.json").read_text())
    assert clusters["digest"] == start.facts["clusters"]
    assert "Clusters" in (cell / "clusters.html").read_text()
    assert "as typed" in (outcome.folder / "report.html").read_text()
    assert len((cell / "history.jsonl").read_text().splitlines()) == 2
    assert len(list(configs.glob("runs/pairs/*/shard-*.safetensors"))) == 2

    # From nothing but the seed, and the features that are kept.
    again = run(configs / "meta.yaml", restart=True)
    assert torch.equal(read_start(f"gram:{again.folder}").prompts["context"], start.prompts["context"])

    overrides = [f"train.init=gram:{again.folder}"]
    tuned = run(configs / "fewshot.yaml", overrides)
    assert tuned.failures == []
    assert tuned.metrics["init_checksum"] == start.checksum


def test_methods_start_from_a_stage_that_runs_first_and_settings_make_tables(configs: Path) -> None:
    text = f"""
task: classification
name: all
output: {configs / "runs"}
data: {{name: scenes/kind, validate_on: none}}
before: {{start: {{cfg: {configs}/meta.yaml}}}}
settings:
  few shots: {{protocol: {{name: coop-fewshot, shots: [1]}}}}
  other tasks: {{protocol: {{name: cross-dataset, shots: [1], targets: [scenes/arrangement, scenes/size]}}}}
protocol: {{seeds: [1, 2], baseline: {{gram: usual, longer: gram}}}}
methods:
  usual: {{cfg: {configs}/fewshot.yaml}}
  gram: {{cfg: {configs}/fewshot.yaml, train: {{init: "gram:start"}}}}
  longer: {{cfg: {configs}/fewshot.yaml, train: {{epochs: 2}}}}
"""
    (configs / "all.yaml").write_text(text)
    outcome = run(configs / "all.yaml")
    assert outcome.failures == []
    check_foretold(outcome.folder)
    titles = [table.title for table in outcome.tables]
    assert titles[0] == "few shots"
    assert titles[1].startswith("few shots: gain over usual")
    assert titles[2].startswith("few shots: gain over gram")
    assert titles[3] == "other tasks"
    across = outcome.results.select("score", setting="other tasks", method="gram")
    assert len(across) == 6  # a source and two targets, two seeds
    (start,) = (outcome.folder / "cells").glob("before_start_*")
    checksum = read_start(f"gram:{start}").checksum
    assert outcome.metrics["few shots/gram/init_checksum"] == checksum
    assert (outcome.folder / "table-2.csv").is_file()


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
