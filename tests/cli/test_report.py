"""``vlprompt report``: the tables of finished runs, alone and side by side."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.commands import Command
from tests.experiments.toys import Toy, ToyConfig
from vlprompt.experiments.runner import RunOutcome, run_experiment


def run(name: str = "toy", **changes: object) -> RunOutcome:
    return run_experiment(Toy(ToyConfig(task="toy", name=name, **changes)))


def labels(text: str) -> list[str]:
    """Return the first column of the first Markdown table."""
    table = text.split("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def test_one_run_has_its_own_tables(command: Command, toy: str) -> None:
    outcome = run()
    answer = command("report", outcome.folder)
    assert answer.status == 0
    assert answer.out == (outcome.folder / "table.md").read_text()


@pytest.mark.parametrize(("format", "ending"), [("csv", "csv"), ("latex", "tex")])
def test_formats(command: Command, toy: str, format: str, ending: str) -> None:
    outcome = run(methods={"one": 0.1})
    answer = command("report", outcome.folder, "--format", format)
    assert answer.out == (outcome.folder / f"table.{ending}").read_text()


def test_runs_with_other_methods_share_a_table(command: Command, toy: str) -> None:
    first = run("first", methods={"one": 0.1})
    second = run("second", methods={"two": 0.2})
    assert labels(command("report", first.folder, second.folder).out) == ["one", "two"]


def test_a_baseline_that_both_runs_have_is_shown_once(command: Command, toy: str) -> None:
    first = run("first", methods={"one": 0.1, "two": 0.2})
    second = run("second", methods={"one": 0.1, "three": 0.3})
    answer = command("report", first.folder, second.folder)
    assert labels(answer.out) == ["one", "two", "three"]


def test_methods_that_collide_carry_the_runs_name(command: Command, toy: str) -> None:
    first = run("first", methods={"one": 0.1, "two": 0.2})
    second = run("second", methods={"one": 0.1, "two": 0.4})
    answer = command("report", first.folder, second.folder, "--format", "csv")
    rows = list(csv.DictReader(answer.out.splitlines()))
    values = {row["method"]: float(row["a"]) for row in rows[:3]}
    assert list(values) == ["one", "two (first)", "two (second)"]
    assert values["two (second)"] == pytest.approx(values["two (first)"] + 20)


def test_runs_of_one_name_are_told_apart_by_their_ids(command: Command, toy: str) -> None:
    first = run(methods={"two": 0.2})
    second = run(methods={"two": 0.4})
    expected = [f"two (toy/{outcome.folder.name})" for outcome in (first, second)]
    assert labels(command("report", first.folder, second.folder).out) == expected


def test_one_method_with_two_settings_is_never_merged(command: Command, toy: str) -> None:
    """Other seeds alone would look like more repetitions of the same."""
    first = run("first", methods={"two": 0.2}, seeds=[1])
    second = run("second", methods={"two": 0.4}, seeds=[2])
    assert labels(command("report", first.folder, second.folder).out) == ["two (first)", "two (second)"]


def test_the_same_run_twice_is_one(command: Command, toy: str) -> None:
    outcome = run()
    assert command("report", outcome.folder, outcome.folder).out == command("report", outcome.folder).out


def test_mistakes_are_messages(command: Command, toy: str, tmp_path: Path) -> None:
    outcome = run()
    (tmp_path / "empty").mkdir()
    answer = command("report", "empty")
    assert answer.status == 2
    assert "empty is not the folder of a finished run: it has no config.yaml" in answer.err

    with (outcome.folder / "results.jsonl").open("a") as file:
        file.write("{\n")
    answer = command("report", outcome.folder)
    assert answer.status == 2
    assert "results.jsonl, line 17 is no line of results" in answer.err
