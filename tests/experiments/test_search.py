"""Searching a configuration: what is tried depends on nothing but the seed, nothing is scored on test data."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.data.folders import tree
from tests.experiments.postgres import postgres_server
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.experiments.search.options import Dimension, SearchOptions
from vlprompt.experiments.search.searching import search
from vlprompt.experiments.search.study import Attempt, Study
from vlprompt.experiments.tasks import run

pytest.importorskip("optuna")

SPACE: dict[str, Any] = {
    "x": {"low": -2.0, "high": 2.0},
    "rate": {"low": 1e-4, "high": 1.0, "log": True},
    "depth": {"low": 1, "high": 9},
    "kind": {"choices": ["good", "bad"]},
}
CLASSIFICATION: dict[str, Any] = {
    "task": "classification",
    "name": "small",
    "backbone": {"name": "tiny"},
    "learner": {"name": "taskres"},
    "train": {"epochs": 2, "lr": 0.01, "batch_size": 16},
    "protocol": {"shots": [2], "seeds": [1]},
    "search": {
        "objective": "accuracy",
        "space": {
            "train.lr": {"low": 1e-4, "high": 10.0, "log": True},
            "learner.alpha": {"choices": [0.1, 1.0]},
        },
        "trials": 2,
        "startup": 2,
    },
}


def options(**changes: Any) -> SearchOptions:
    whole = {"objective": "score", "direction": "minimize", "space": SPACE, "trials": 8, "startup": 4}
    return SearchOptions.model_validate({**whole, **changes})


def bowl(params: Mapping[str, Any]) -> float:
    """A function whose least value, 0, is at x=1, rate=0.01, depth=3, kind=good."""
    height = (params["x"] - 1) ** 2 + (math.log10(params["rate"]) + 2) ** 2 + (params["depth"] - 3) ** 2 / 9
    return float(height + (params["kind"] == "bad"))


def study_at(folder: Path, name: str = "a", **changes: Any) -> Study:
    return Study(f"sqlite:///{folder / f'{name}.db'}", "study", options(**changes))


def tried(study: Study) -> list[dict[str, Any]]:
    return [record.record() for record in study.records()]


def work(study: Study) -> list[dict[str, Any]]:
    study.work(lambda attempt: bowl(attempt.params))
    return tried(study)


def test_what_is_tried_is_inside_the_space_and_gets_better(tmp_path: Path) -> None:
    records = work(study_at(tmp_path, trials=20))
    assert [record["trial"] for record in records] == list(range(20))
    for record in records:
        params = record["params"]
        assert -2 <= params["x"] <= 2
        assert 1e-4 <= params["rate"] <= 1
        assert params["depth"] in range(1, 10)
        assert isinstance(params["depth"], int)
        assert record["value"] == bowl(params)
    random, learned = records[:4], records[-8:]
    assert min(r["value"] for r in learned) < min(r["value"] for r in random)


def test_the_seed_and_nothing_else_says_what_is_tried(tmp_path: Path) -> None:
    first = work(study_at(tmp_path, "first"))
    assert first == work(study_at(tmp_path, "again"))
    assert first != work(study_at(tmp_path, "other", seed=2))
    longer = study_at(tmp_path, "first", trials=10)
    assert work(longer)[:8] == first  # more trials continue it


@pytest.mark.parametrize("killed", [0, 5])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, killed: int) -> None:
    whole = work(study_at(tmp_path, "whole"))
    study = study_at(tmp_path, "killed")

    def dies(attempt: Attempt) -> float:
        if attempt.place == killed:
            raise KeyboardInterrupt
        return bowl(attempt.params)

    with pytest.raises(KeyboardInterrupt):
        study.work(dies)
    assert work(study_at(tmp_path, "killed")) == whole


def pruned_by(values: Mapping[int, list[float]]) -> Callable[[Attempt], float]:
    """Return trials that report a list of values by place, an epoch each, and end with the last."""

    def trial(attempt: Attempt) -> float:
        curve = values.get(attempt.place, [1.0, 0.5, 0.25])
        for epoch, value in enumerate(curve):
            attempt.report(0, epoch, value)
        return curve[-1]

    return trial


def test_a_trial_ends_where_it_is_worse_than_the_median_of_earlier_rounds(tmp_path: Path) -> None:
    study = study_at(tmp_path, trials=8, startup=4, together=4)
    study.work(pruned_by({5: [1.0, 0.9, 0.1], 6: [0.9, 0.4, 0.2]}))
    states = [record.state for record in study.records()]
    # The fifth was at 0.9 where all others had been at 0.5; that it would have ended better nobody knew.
    assert states == ["complete"] * 5 + ["pruned", "complete", "complete"]
    assert study.best().place == 6


def test_reports_survive_a_kill(tmp_path: Path) -> None:
    """A training that continues tells its first epochs no second time."""
    study = study_at(tmp_path, trials=8, startup=4, together=4)

    def dies(attempt: Attempt) -> float:
        if attempt.place == 5:
            attempt.report(0, 0, 1.0)
            raise KeyboardInterrupt
        return pruned_by({})(attempt)

    with pytest.raises(KeyboardInterrupt):
        study.work(dies)
    seen = []

    def continues(attempt: Attempt) -> float:
        seen.append(attempt.place)
        attempt.report(0, 1, 0.9 if attempt.place == 5 else 0.5)
        return 0.2

    study_at(tmp_path, trials=8, startup=4, together=4).work(continues)
    assert seen[0] in (5, 6, 7)
    trials = {t.user_attrs["place"]: t for t in study.study.trials if t.state.name == "PRUNED"}
    assert trials[5].intermediate_values == {0: 1.0, 1: 0.9}


def test_trials_that_fail_are_counted_and_if_all_do_the_search_stops(tmp_path: Path) -> None:
    def fails(attempt: Attempt) -> float:
        if attempt.place in (1, 2):
            raise VLPromptError("the loss is not finite")
        return bowl(attempt.params)

    study = study_at(tmp_path, trials=6)
    study.work(fails)
    assert [record.error for record in study.records()][:3] == [None, *["the loss is not finite"] * 2]
    assert study.best().place not in (1, 2)

    def always(attempt: Attempt) -> float:
        raise VLPromptError(f"broken at {attempt.place}")

    with pytest.raises(VLPromptError, match="first trials of study failed, the last one with: broken at 2"):
        study_at(tmp_path, "broken").work(always)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "test/accuracy"}, "figure of test data, which nothing is ever chosen by"),
        ({"monitor": "test_loss"}, "figure of test data"),
        ({"space": {}}, "at least 1"),
        ({"space": {"x": {"low": 3}}}, "low and high with low < high, or choices"),
        ({"space": {"x": {"low": 3, "high": 1}}}, "low < high"),
        ({"space": {"x": {"low": 1, "high": 3, "choices": [1]}}}, "or choices"),
        ({"space": {"x": {"low": 0, "high": 3, "log": True}}}, "above 0"),
    ],
)
def test_mistakes_of_the_section(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        options(**changes)


def test_latest_and_contest_are_no_test_data() -> None:
    assert options(objective="latest/accuracy", monitor="contest").objective == "latest/accuracy"
    assert Dimension(low=1, high=3).is_whole
    assert not Dimension(low=1.0, high=3).is_whole


def write_config(folder: Path, **changes: Any) -> Path:
    parts = [f"{part}/{kind}" for part in ("train", "val", "test") for kind in ("cat", "dog")]
    data = {"name": tree(folder / "photos", *parts), "on_bad_image": "error"}
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump({**CLASSIFICATION, "data": data, "output": str(folder / "runs"), **changes})
    )
    return path


def test_a_search_ends_with_a_configuration_that_runs(tmp_path: Path) -> None:
    outcome = search(write_config(tmp_path))
    assert outcome.best == outcome.folder / "best.yaml"
    values = [record.value for record in outcome.trials]
    assert outcome.value == max(values)  # type: ignore[type-var]

    # What a trial says is what its run says, on validation images.
    place = values.index(outcome.value)
    (metrics,) = (outcome.folder / "trials" / f"{place:04d}").glob("*/metrics.json")
    trial = json.loads(metrics.read_text())
    assert trial["accuracy"] == outcome.value
    assert trial["split"] == "val"

    best = run(outcome.best, [f"output={tmp_path / 'best'}"])
    assert best.metrics["split"] == "test"
    assert best.folder.parent.name == "best_small"
    validated = run(outcome.best, [f"output={tmp_path / 'best'}", "data.split=val"])
    assert validated.metrics["accuracy"] == outcome.value

    before = {path: path.stat().st_mtime_ns for path in (outcome.folder / "trials").rglob("*.json")}
    again = search(tmp_path / "small.yaml")
    assert again.value == outcome.value
    assert {path: path.stat().st_mtime_ns for path in (outcome.folder / "trials").rglob("*.json")} == before


def test_a_search_opens_no_test_image(tmp_path: Path) -> None:
    """The test split holds files that are no images: a run finds that out, a search does not."""
    cfg = write_config(tmp_path, search={**CLASSIFICATION["search"], "trials": 1})
    for path in (tmp_path / "photos" / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    assert search(cfg).trials[0].state == "complete"
    with pytest.raises(VLPromptError, match="image"):
        run(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search=null", "says nothing of what is searched"),
        ("search.objective=acuracy", "Did you mean 'accuracy'"),
        ("search.space={train.lrr: {low: 1, high: 2}}", "search.space.train.lrr: train.lrr: unknown key"),
        ("search.space={train.lr: {low: -1.0, high: 2.0, log: false}}", "greater than 0"),
        ("search.space={learner.name: {choices: [coop, cop]}}", "Did you mean 'coop'"),
        ("search.changes={train.epohcs: 1}", "search.changes: train.epohcs: unknown key"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    cfg = write_config(tmp_path)
    with pytest.raises(ConfigError) as caught:
        search(cfg, [override])
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_storage_that_is_none(tmp_path: Path) -> None:
    cfg = write_config(tmp_path)
    with pytest.raises(VLPromptError, match="names no database"):
        search(cfg, storage="my computer")
    with pytest.raises(VLPromptError, match="the database can't be used"):
        search(cfg, storage=f"sqlite:///{tmp_path / 'no' / 'folder' / 'study.db'}")


WORKER = """
import sys, time
from tests.experiments.test_search import bowl, options
from vlprompt.experiments.search.study import Study

def slow(attempt):
    time.sleep(0.02 * (attempt.place % 3))
    return bowl(attempt.params)

Study(sys.argv[1], "study", options()).work(slow)
"""


def run_workers(storage: str, count: int) -> None:
    """Run several processes on a study at the same time, the first of which is killed and started again."""
    command = [sys.executable, "-c", WORKER, storage]
    root = Path(__file__).parents[2]
    workers = [subprocess.Popen(command, cwd=root) for _ in range(count)]
    watched = Study(storage, "study", options())
    while not tried(watched):
        time.sleep(0.2)
    workers[0].kill()
    workers[0].wait()
    workers[0] = subprocess.Popen(command, cwd=root)
    assert [worker.wait(timeout=600) for worker in workers] == [0] * count


@pytest.mark.slow
def test_several_workers_of_one_file_try_what_one_does(tmp_path: Path) -> None:
    alone = work(study_at(tmp_path, "alone"))
    storage = f"sqlite:///{tmp_path / 'together.db'}"
    run_workers(storage, 2)
    assert tried(Study(storage, "study", options())) == alone


@pytest.mark.slow
def test_several_workers_of_a_postgresql_server_try_what_one_does(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with postgres_server() as storage:
        run_workers(storage, 2)
        assert tried(Study(storage, "study", options())) == work(study_at(tmp_path, "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("on", ["processes:2", "ray:cores=2", "slurm:local,jobs=2"])
def test_trials_in_two_places_are_those_of_one(tmp_path: Path, on: str) -> None:
    cfg = write_config(tmp_path)
    changes = ["search.trials=4", "search.together=2", "search.monitor=val/accuracy"]
    serial = search(cfg, [*changes, f"output={tmp_path / 'serial'}"])
    parallel = search(cfg, [*changes, f"output={tmp_path / 'parallel'}"], on=on)
    assert parallel.trials == serial.trials
    assert (parallel.folder / "trials.jsonl").read_bytes() == (serial.folder / "trials.jsonl").read_bytes()


@pytest.mark.slow
def test_adaptation_and_segmentation_are_searched_by_the_same_command(tmp_path: Path) -> None:
    adaptation = {
        "task": "adaptation",
        "name": "adapt",
        "output": str(tmp_path / "runs"),
        "backbone": {"name": "tiny"},
        "data": {"name": "scenes/shape@sketch", "test_images": 12},
        "methods": {"tda": {}},
        "search": {
            "objective": "tda/scenes/shape@sketch/accuracy",
            "space": {"methods.tda.alpha": {"low": 0.5, "high": 4.0}},
            "trials": 2,
        },
    }
    path = tmp_path / "adapt.yaml"
    path.write_text(yaml.safe_dump(adaptation))
    outcome = search(path)
    best = yaml.safe_load(outcome.best.read_text())
    assert best["methods"]["tda"]["alpha"] == outcome.params["methods.tda.alpha"]
    assert best["data"]["split"] == "test"

    from tests.segmentation.runs import BENCHMARK, SKETCH

    objective = f"small/vpt/{SKETCH}/dice"
    section = {
        "objective": objective,
        "space": {
            "methods.vpt.train.lr": {"low": 0.01, "high": 0.1},
            "methods.vpt.depth": {"low": 1, "high": 4},
        },
        "trials": 2,
        "changes": {"overlays": 0, "boundary": False, "protocol.seeds": [1]},
    }
    path.write_text(yaml.safe_dump({**BENCHMARK, "output": str(tmp_path / "runs"), "search": section}))
    outcome = search(path)
    best = yaml.safe_load(outcome.best.read_text())
    assert best["methods"]["vpt"]["depth"] == outcome.params["methods.vpt.depth"]
    assert best["protocol"]["seeds"] == [1, 2]  # the changes of trials are no part of it
    assert best["overlays"] == 2
    shutil.rmtree(outcome.folder)
