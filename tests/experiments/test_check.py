"""What a configuration expects, and whether a run reaches it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import Command
from vlprompt.core.errors import CheckpointError, ConfigError
from vlprompt.data import load_dataset
from vlprompt.experiments.check import check_run
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment
from vlprompt.experiments.tasks import run as run_config

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


def test_a_run_with_another_name_is_held_against_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    cfg = write(tmp_path, expectation({"accuracy": {"value": 5.0, "within": 0.01}}))
    changed = run_config(cfg, ["name=other", "protocol.shots=[2]"]).folder
    (verdict,) = check_run(changed)
    assert verdict.outcome == "not comparable"
    assert verdict.reason == "protocol.shots=[2] instead of [1]"

    renamed = run_config(cfg, ["name=other"]).folder
    assert [verdict.outcome for verdict in check_run(renamed)] == ["fail"]


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


def test_where_no_figure_is_known_the_source_says_why(run: Path, tmp_path: Path, command: Command) -> None:
    cfg = write(tmp_path, {"kind": "none", "source": "nobody ran it"})
    (verdict,) = check_run(run, str(cfg))
    assert verdict.text() == "not comparable: no figure is known: nobody ran it"
    assert command("check", run, "--against", cfg).status == 0
    assert command("run", cfg, "--expect-only").out == "no figure is known: nobody ran it\n"

    both = write(tmp_path, expectation({"accuracy": {"value": 0.5}}, kind="none"))
    with pytest.raises(ConfigError, match="kind is published, recalled or measured"):
        read_experiment(both)
    neither = write(tmp_path, expectation({}))
    with pytest.raises(ConfigError, match="kind: none, and source says why"):
        read_experiment(neither)


def test_a_figure_that_no_run_can_have_is_a_mistake_of_the_configuration(
    tmp_path: Path, command: Command
) -> None:
    cfg = write(tmp_path, expectation({"accuracy": {"value": 0.5}, "acuracy": {"value": 0.5}}))
    answer = command("check", cfg)
    assert answer.status == 2
    assert "expect.0.figures: unknown figure 'acuracy'. Did you mean 'accuracy'" in answer.err


def test_the_place_of_a_folder_is_no_setting_but_its_name_is(tmp_path: Path) -> None:
    digits = load_dataset("digits", "train", shots=3, seed=1)
    names = [digits.classnames[label] for label in digits.labels]
    for place in ("here", "there"):
        for number, name in enumerate(names):
            path = tmp_path / place / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            digits[number][0].save(path)

    data = {"name": "folder:${data.root}", "root": str(tmp_path / "here" / "photos"), "validate_on": "none"}
    figure = expectation({"accuracy": {"value": 0.5, "within": 0.5}})
    content = {**BASE, "data": data, "output": str(tmp_path / "runs"), "expect": [figure]}
    cfg = tmp_path / "photos.yaml"
    cfg.write_text(yaml.safe_dump(content))
    folder = run_experiment(read_experiment(cfg)).folder

    moved = read_experiment(cfg, [f"data.root={tmp_path / 'there' / 'photos'}"])
    cfg.write_text(yaml.safe_dump({**content, "data": moved.config.model_dump(mode="json")["data"]}))
    assert [verdict.outcome for verdict in check_run(folder, str(cfg))] == ["pass"]

    cfg.write_text(yaml.safe_dump({**content, "data": {**data, "root": str(tmp_path / "other")}}))
    (verdict,) = check_run(folder, str(cfg))
    assert "folder:photos instead of folder:other" in verdict.reason


def test_a_figure_of_a_folder_is_found_wherever_the_folder_lies(run: Path, tmp_path: Path) -> None:
    cfg = write(tmp_path, expectation({"folder:photos/accuracy": {"value": 0.5, "within": 0.1}}))
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    for data in ("folder:/somewhere/photos", ["digits", "folder:/somewhere/photos"]):
        figures = {"folder:/somewhere/photos/accuracy": 0.55, "data": data}
        (moved / "metrics.json").write_text(json.dumps(figures))
        (verdict,) = check_run(moved, str(cfg))
        assert (verdict.outcome, verdict.value) == ("pass", 0.55)
