"""The search of options: where a killed one goes on, what it leaves, what it can't do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.experiments.foretold import check_foretold
from tests.segmentation.runs import BENCHMARK, SKETCH, read, run, write_config
from vlprompt.core.errors import VLPromptError
from vlprompt.segmentation.fit import SegmentationFit
from vlprompt.segmentation.protocols.base import SegmentationExperiment

optuna = pytest.importorskip("optuna")

SEARCH: dict[str, Any] = {
    **BENCHMARK,
    "protocol": {"name": "search", "images": 4, "seeds": [1, 2]},
    "train": {"epochs": 1, "batch_size": 4},
    "search": {
        "trials": 4,
        "startup": 2,
        "space": {"train.lr": {"low": 0.01, "high": 0.1, "log": True}, "depth": {"low": 1, "high": 9}},
    },
}


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    return write_config(tmp_path, SEARCH)


def test_a_search_continues_where_it_was_killed_as_if_it_had_not_been(
    cfg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(cfg, "name=whole")
    train = SegmentationExperiment.train
    calls: list[int] = []

    def dies(self: SegmentationExperiment, *arguments: Any, **options: Any) -> SegmentationFit:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationExperiment, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            run(cfg, "name=killed")
    again = run(cfg, "name=killed")

    for name in ("metrics.json", "results.jsonl", "table.md"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    (cell,) = (again.folder / "cells").iterdir()  # zero-shot has nothing to vary
    study = optuna.load_study(study_name="study", storage=f"sqlite:///{cell / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 4
    assert states.count("FAIL") == 1
    value, params = min((t.value, t.params) for t in study.trials if t.value is not None)
    assert again.metrics[f"small/vpt/{SKETCH}/loss"] == value
    assert again.metrics[f"small/vpt/{SKETCH}/params"] == params
    assert params["depth"] <= 5  # the layers of the tower


def test_what_was_best_is_a_configuration_that_runs(cfg: Path) -> None:
    outcome = run(cfg)
    check_foretold(outcome.folder)
    (cell,) = (outcome.folder / "cells").iterdir()
    params = outcome.metrics[f"small/vpt/{SKETCH}/params"]
    best = read(cell / "best.yaml").config
    assert best.train_options("vpt")["lr"] == params["train.lr"]
    assert best.method("vpt").options["depth"] == params["depth"]
    assert list(best.methods) == ["zero_shot", "vpt"]

    benchmark = run(cell / "best.yaml", "protocol.seeds=[1]", "overlays=0")
    assert benchmark.failures == []
    trained = benchmark.results.select("val/loss", method="vpt", part="train").values()
    assert trained == pytest.approx([outcome.metrics[f"small/vpt/{SKETCH}/loss"]])


def test_nothing_to_search_and_trials_that_all_fail(cfg: Path) -> None:
    with pytest.raises(VLPromptError, match="there is nothing to search"):
        run(cfg, "methods.vpt=null")
    with pytest.raises(VLPromptError, match="the first trials failed, the last one with"):
        run(cfg, "search.space={context_length: {choices: [500]}}")


@pytest.mark.slow
def test_studies_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    cfg = write_config(tmp_path, {**SEARCH, "methods": {"vpt": {}, "coop": {}}})
    serial = run(cfg, "name=serial", "search.trials=2")
    parallel = run(cfg, "name=parallel", "search.trials=2", on="processes:2")
    assert (serial.folder / "results.jsonl").read_bytes() == (parallel.folder / "results.jsonl").read_bytes()
    assert (serial.folder / "metrics.json").read_bytes() == (parallel.folder / "metrics.json").read_bytes()
