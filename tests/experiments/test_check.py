"""What a configuration expects, and whether a run reaches it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Command
from vlprompt.core.errors import CheckpointError
from vlprompt.experiments.check import check_run
from vlprompt.experiments.config import list_configs
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment

BASE: dict[str, Any] = {
    "task": "classification",
    "name": "expected",
    "learner": {"name": "zero_shot"},
    "data": {"name": "digits", "validate_on": "none"},
    "protocol": {"shots": [1], "seeds": [1]},
}


def expectation(figures: dict[str, dict[str, float]], **rest: Any) -> dict[str, Any]:
    return {"figures": figures, "kind": "measured", "source": "this test", **rest}


def write(folder: Path, *expected: dict[str, Any]) -> Path:
    cfg = folder / "expected.yaml"
    cfg.write_text(yaml.safe_dump({**BASE, "output": str(folder / "runs"), "expect": list(expected)}))
    return cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    return run_experiment(read_experiment(write(folder))).folder


def test_a_figure_inside_its_interval_passes_and_one_outside_fails(run: Path, tmp_path: Path) -> None:
    accuracy = json.loads((run / "metrics.json").read_text())["accuracy"]
    cfg = write(
        tmp_path,
        expectation({"accuracy": {"value": accuracy + 0.019, "within": 0.02}}),
        expectation({"accuracy": {"value": accuracy - 0.021, "within": 0.02}}),
    )
    near, far = check_run(run, str(cfg))
    assert (near.outcome, far.outcome) == ("pass", "fail")
    assert near.value == accuracy
    assert near.text().startswith("pass: reached")
    assert "this test" in near.text()


def test_other_settings_are_not_comparable_and_named(run: Path, tmp_path: Path) -> None:
    figure = {"accuracy": {"value": 0.5, "within": 0.5}}
    cfg = write(
        tmp_path,
        expectation(figure, under={"data.name": "scenes/shape", "protocol.shots": [4]}),
        expectation({"speed": {"value": 1.0, "within": 0.5}}),
    )
    other, unknown = check_run(run, str(cfg))
    assert other.outcome == "not comparable"
    assert "data.name=digits instead of scenes/shape" in other.reason
    assert "protocol.shots=[1] instead of [4]" in other.reason
    assert unknown.reason == "the run has no figure 'speed'"


def test_where_files_lie_and_what_is_expected_changes_no_setting_and_no_id(run: Path, tmp_path: Path) -> None:
    cfg = write(tmp_path, expectation({"accuracy": {"value": 0.5, "within": 0.5}}))
    again = run_experiment(read_experiment(cfg, [f"data.cache_dir={tmp_path}"])).folder
    (verdict,) = check_run(again, str(cfg))
    assert verdict.outcome == "pass"

    same = read_experiment(cfg, [f"output={run.parent.parent}"])
    assert run_experiment(same).finished_before


def test_a_run_that_is_not_finished_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match="no finished run"):
        check_run(tmp_path)


def test_the_command_says_pass_or_fail_by_its_status(run: Path, tmp_path: Path, command: Command) -> None:
    for value, status, word in ((0.5, 0, "pass"), (5.0, 1, "fail")):
        cfg = write(tmp_path, expectation({"accuracy": {"value": value, "within": 0.5}}))
        answer = command("check", run, "--against", cfg)
        assert answer.status == status, answer.err
        assert answer.out.startswith(word)

    assert "expects no figure" in command("check", run).out
    printed = command("run", cfg, "--expect-only")
    assert printed.status == 0
    assert printed.out.startswith("accuracy 5 +- 0.5 (measured: this test)")


def test_a_file_that_is_based_on_another_expects_nothing_of_it(tmp_path: Path) -> None:
    write(tmp_path, expectation({"accuracy": {"value": 0.5}}))
    above = tmp_path / "above.yaml"
    above.write_text("_base_: expected.yaml\nname: above\n")
    assert read_experiment(above).config.expect == []


SHIPPED = [name for name, path in list_configs().items() if path.parent.name != "pretraining"]


@pytest.mark.parametrize("name", SHIPPED)
def test_settings_of_shipped_expectations_are_valid(name: str) -> None:
    for expected in read_experiment(name).config.expect:
        overrides = [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in expected.under.items()
        ]
        read_experiment(name, overrides)
