from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts
from vlprompt.concepts.search import ConceptSearch, SearchResult
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.seeding import torch_rng
from vlprompt.core.slugs import slug
from vlprompt.experiments.concept_study import ConceptConfig, ConceptExperiment, Scores
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.statistics import paired_difference
from vlprompt.training.options import TrainOptions


class ToyConfig(ConceptConfig):
    expected_task: ClassVar[str] = "toy"


class ToySearch(ConceptSearch):
    """Two concepts of one vector of width 3; nothing is trained, the seed says what was learned."""

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        return Concepts("detector", self.concepts().detach(), tuple(names), {})


class Toy(ConceptExperiment):
    """Scores are sums of weights: the host's and the concepts'."""

    metrics = ("AP", "AP50")
    headline_metric = "AP50"
    fail: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.host = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.host.weight, 0.5)

    host_name = "toy"  # type: ignore[assignment]

    def host_facts(self) -> dict[str, Any]:
        return {"detector": {"kind": "toy"}}

    def test_names(self) -> dict[str, str]:
        return {"test": self.config.data.name, **self.config.data.also_test}

    def classnames(self) -> tuple[str, ...]:
        return ("cat", "dog")

    def score_baseline(self, method: str) -> Scores:
        return self._scores(0.0)

    def search(
        self,
        images: int | None,
        options: TrainOptions,
        folder: Path,
        unfreeze: Sequence[str] = (),
        start: Tensor | None = None,
    ) -> SearchResult[Any]:
        concepts = ConceptEmbedding(2, 1, 3)
        noise = torch.rand(2, 1, 3, generator=torch_rng(options.seed, "toy", images or 0))
        concepts.begin(noise if start is None else start)
        module = ToySearch(concepts, self.host, unfreeze)
        with torch.no_grad():
            # As training would.
            for parameter in module.unfrozen.parameters():
                parameter += 1
        return SearchResult(module, [{"epoch": 0, "loss": 1.0}], seconds=2.0)

    def score(self, module: ConceptSearch) -> Scores:
        if self.fail and len(list(module.unfrozen.parameters())):
            raise DataError("scoring fails.")
        return self._scores(float(module.concepts().detach().mean()))

    def _scores(self, value: float) -> Scores:
        score = value + float(self.host.weight.detach())
        return {part: {"AP": score, "AP50": score / 2} for part in self.test_names()}


def config_of(folder: Path, **changes: Any) -> ToyConfig:
    raw: Mapping[str, Any] = {
        "task": "toy",
        "output": str(folder),
        "data": {"name": "a", "also_test": {"sketch": "b"}},
        "protocol": {"images": [4, None], "seeds": [1, 2, 3]},
    }
    return ToyConfig.parse(raw, changes, "toy.yaml")


def test_cells_are_a_baseline_and_a_search_for_each_number_of_images_and_seed(tmp_path: Path) -> None:
    names = [cell.name for cell in Toy(config_of(tmp_path)).cells()]
    searches = [f"concepts_{images}seed{seed}" for images in ("images4_", "") for seed in (1, 2, 3)]
    assert names == [slug("class names"), *searches]


def test_a_run_is_computed_from_the_long_table(tmp_path: Path) -> None:
    outcome = run_experiment(Toy(config_of(tmp_path)))
    metrics = outcome.metrics
    assert metrics["class names/test/AP"] == 0.5
    assert metrics[outcome.headline] == metrics["concepts, all images/test/AP50"]
    values = outcome.results.select("AP", method="concepts", images=4, part="sketch").values()
    assert metrics["concepts, 4 images/sketch/AP"] == pytest.approx(sum(values) / 3)

    table, gains = outcome.tables
    assert [row.method for row in table.rows] == ["class names", "concepts, 4 images", "concepts, all images"]
    assert table.columns == ["test AP", "test AP50", "sketch AP", "sketch AP50"]
    expected = paired_difference(values, [0.5] * 3)
    assert gains.rows[0].values["sketch AP"] == expected

    page = (outcome.folder / "report.html").read_text()
    assert "Concepts for toy on a" in page
    timings = json.loads((outcome.folder / "timings.json").read_text())
    assert timings == {"concepts, 4 images": [2.0] * 3, "concepts, all images": [2.0] * 3}
    assert "seconds" not in (outcome.folder / "metrics.json").read_text()
    concepts = Concepts.load(outcome.folder / "cells" / "concepts_seed2" / "concepts.safetensors", "detector")
    assert concepts.names == ("cat", "dog")


def test_the_second_stage_is_a_stage_of_the_same_cell_and_leaves_the_host_as_it_was(tmp_path: Path) -> None:
    experiment = Toy(config_of(tmp_path, second_stage={"unfreeze": ["weight"], "train": {"epochs": 3}}))
    outcome = run_experiment(experiment)
    first = outcome.metrics["concepts, 4 images/test/AP"]
    assert outcome.metrics["concepts, 4 images, second stage/test/AP"] == pytest.approx(first + 1)
    assert float(experiment.host.weight) == 0.5
    assert {line.where.get("stage") for line in outcome.results.lines} == {None, "second"}
    assert experiment.config.second_options(seed=7) == TrainOptions(epochs=3, seed=7)


def test_a_cell_that_fails_leaves_the_host_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "fail", True)
    experiment = Toy(config_of(tmp_path, second_stage={"unfreeze": ["weight"]}))
    outcome = run_experiment(experiment)
    assert outcome.metrics["runs_failed"] == 6
    assert float(experiment.host.weight) == 0.5
    assert outcome.metrics["class names/test/AP"] == 0.5

    module = ToySearch(ConceptEmbedding(2, 1, 3), experiment.host, ["weight"])
    with pytest.raises(DataError, match="fails"), module.unfrozen.restored_on_error():
        experiment.score(module)
    assert not experiment.host.weight.requires_grad


def test_mistakes_are_all_named(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"also_test": {"test": "c"}},
        "train": {"select": "best", "init": "gram:x"},
        "second_stage": {"unfreeze": ["weight"], "train": {"epoch": 1}},
    }
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, **changes)
    problems = caught.value.problems
    for text in ("data.also_test: 'test' is", "train.init", "did you mean 'epochs'", "data.validate_on"):
        assert any(text in problem for problem in problems), text
    assert len(problems) == 4
    with pytest.raises(ConfigError, match=r"use protocol.seeds|write protocol.seeds=\[3\]"):
        config_of(tmp_path, train={"seed": 3})
