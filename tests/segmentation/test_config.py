"""Configurations of segmentation: all mistakes at once, and every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.segmentation.runs import BENCHMARK, read, write_config
from vlprompt.core.errors import ConfigError
from vlprompt.experiments.config import configs_dir
from vlprompt.experiments.tasks import read_experiment
from vlprompt.segmentation.protocols.benchmark import BenchmarkExperiment
from vlprompt.segmentation.protocols.concepts import ConceptMaskExperiment

SHIPPED = sorted((configs_dir() / "segmentation").glob("*.yaml"))


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    return write_config(tmp_path, BENCHMARK)


def test_every_mistake_of_a_configuration_at_once(cfg: Path) -> None:
    overrides = [
        "models.small.hiden=3", "models.small.backbone=tyni", "methods.vpt.detph=2", "methods.vpt.train.epoch=1",
        "data.name=[scenes/mask]", "data.augmentation=slite", "train.seed=3", "protocol.seed=1",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        read(cfg, *overrides)
    text = str(caught.value)
    for part in (
        "models.small.hiden: unknown key; did you mean 'hidden'", "Did you mean 'tiny'", "did you mean 'depth'",
        "methods.vpt.train.epoch: unknown key; did you mean 'epochs'", "Did you mean 'scenes/masks'",
        "Did you mean 'slight'", "protocol.seeds=[3]", "protocol.seed: unknown key; did you mean 'seeds'",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.argmax=true", "data.queries=all"),
        ("protocol.baseline=zero", "Did you mean 'zero_shot'"),
        ("models.small.methods=[vtp]", "Did you mean 'vpt'"),
        ("train.init=gram:x", "train.init: only classification"),
        ("methods.vpt.train.init=gram:x", "methods.vpt.train.init: only classification"),
        ("methods.vpt.train.seed=2", "seeds belong to the protocol"),
        ("protocol.name=benchmarks", "Did you mean 'benchmark'"),
        ("data.name=[]", "name at least one data set"),
        ("data.options={split: test}", "'split' is no option"),
        ("methods={zero_shot: null, vpt: null}", "methods"),
        ("search={trials: 2}", "search.objective: required"),
        ("task=detection", "not of 'segmentation'"),
    ],
)
def test_a_mistake_says_what_is_allowed(cfg: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(cfg, override)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid(path: Path) -> None:
    experiment = read_experiment(path.name)
    assert experiment.cells()
    assert experiment.layout().headline
    assert f"vlprompt run {path.name}" in path.read_text()
    kinds = {"concepts": ConceptMaskExperiment, "benchmark": BenchmarkExperiment}
    assert type(experiment) is kinds[experiment.config.protocol.name]  # type: ignore[attr-defined]


def test_the_resolved_configuration_is_a_configuration(cfg: Path, tmp_path: Path) -> None:
    from vlprompt.experiments.folder import yaml_text

    experiment = read(cfg)
    again = tmp_path / "again.yaml"
    again.write_text(yaml_text(experiment.config))
    assert read(again).config == experiment.config
