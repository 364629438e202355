"""``vlprompt run``: exit statuses, the last line, what continues, and messages about mistakes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.commands import Command
from vlprompt.experiments import tasks

LAST = re.compile(r"^runs/toy/[0-9a-f]{8}/metrics\.json: accuracy 19\.9 %$")
WHOLE = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv", "table.tex")


def folder_of(last: str) -> Path:
    return Path(last.partition(": ")[0]).parent


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WHOLE}


def test_the_last_line_is_the_path_and_the_headline(command: Command, toy: str) -> None:
    answer = command("run", toy)
    assert answer.status == 0
    assert LAST.match(answer.last)
    metrics = json.loads((folder_of(answer.last) / "metrics.json").read_text())
    assert f"{100 * metrics['accuracy']:.1f}" == "19.9"
    assert "| one |" in answer.out
    assert "Gain over one" in answer.out
    assert "finished before" not in answer.out


def test_a_finished_run_says_so_and_stays_as_it_is(command: Command, toy: str) -> None:
    first = command("run", toy)
    folder = folder_of(first.last)
    before = content(folder)
    again = command("run", toy)
    assert again.status == 0
    assert again.last == first.last
    assert f"finished before: nothing was left to run; the results are in {folder}" in again.out
    assert content(folder) == before


def test_the_report_names_the_command_that_repeats_the_run(command: Command, toy: str) -> None:
    """Whatever way a run was started: a continued one ends with the same report."""
    plain = folder_of(command("run", toy).last)
    report = (plain / "report.html").read_text()
    assert "vlprompt run toy.yaml" in report
    started_otherwise = command("run", "--cfg", toy, "--restart")
    assert folder_of(started_otherwise.last) == plain
    assert content(plain) == content(plain.with_name(f"{plain.name}.1"))


def test_the_command_names_shipped_files_alone_and_not_where_cells_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(tasks, "run_experiment", lambda experiment, **options: calls.append(options))
    shipped = tasks.list_configs()["quickstart.yaml"]
    for cfg in ("quickstart", "quickstart.yaml", shipped):
        tasks.run(cfg, ["protocol.seeds=[1, 2]"], on="processes:2", resume=True)
    expected = f"vlprompt run quickstart.yaml {shlex.quote('protocol.seeds=[1, 2]')}"
    assert [call["command"] for call in calls] == [expected] * 3
    assert all(call["on"] == "processes:2" and call["resume"] and not call["restart"] for call in calls)


def test_restart_moves_the_old_run_aside(command: Command, toy: str) -> None:
    folder = folder_of(command("run", toy).last)
    before = content(folder)
    answer = command("run", toy, "--restart")
    assert folder_of(answer.last) == folder
    assert "finished before" not in answer.out
    assert content(folder.with_name(f"{folder.name}.1")) == before


def test_resume_fails_where_there_is_nothing_to_continue(command: Command, toy: str) -> None:
    assert command("run", toy).status == 0
    assert command("run", toy, "--resume").status == 0
    answer = command("run", toy, "--resume", "seeds=[3]")
    assert answer.status == 2
    assert "nothing to continue" in answer.err
    assert "seeds ([1, 2] there, [3] here)" in answer.err
    both = command("run", toy, "--resume", "--restart")
    assert both.status == 2
    assert "give one of them" in both.err


def test_failed_cells_are_told_on_standard_error(command: Command, toy: str) -> None:
    answer = command("run", toy, "fail=[one_a_seed1]")
    assert answer.status == 1
    assert "failed: one_a_seed1: one_a_seed1 can't be read." in answer.err
    assert "failed: one_b_seed1: it needs one_a_seed1" in answer.err
    assert "accuracy" in answer.last
    assert "failed:" not in answer.out


def test_one_reason_that_stops_everything_is_an_error(command: Command, toy: str) -> None:
    answer = command("run", toy, "seeds=[1]", "methods={one: 0.1}", "fail=[one_a_seed1]")
    assert answer.status == 2
    assert answer.err.endswith("error: one_a_seed1 can't be read.\n")
    assert answer.status == 2


def test_ctrl_c_says_that_the_same_command_continues(command: Command, toy: str) -> None:
    answer = command("run", toy, "interrupt=[two_b_seed2]")
    assert answer.status == 130
    assert answer.err.endswith("stopped. The same command continues where it stopped.\n")
    finished = list(Path("runs/toy").glob("*/cells/*/cell.json"))
    assert len(finished) == 7


def test_a_dry_run_prints_the_cells_and_writes_nothing(command: Command, toy: str) -> None:
    answer = command("run", toy, "--dry-run")
    assert answer.status == 0
    assert "8 cells" in answer.out
    assert "one_b_seed1  needs one_a_seed1" in answer.out
    assert answer.last == "nothing is missing"
    assert not Path("runs").exists()


def test_a_dry_run_fails_if_something_is_missing(command: Command, toy: str) -> None:
    answer = command("run", toy, "lacks=[the moon]", "--dry-run")
    assert answer.status == 1
    assert "missing: the moon" in answer.out


def test_cfg_may_be_an_option(command: Command, toy: str) -> None:
    assert command("run", "--cfg", toy, "seeds=[1]").last == command("run", toy, "seeds=[1]").last


def test_options_may_stand_anywhere(command: Command, toy: str) -> None:
    assert command("run", "--on", "serial", toy, "--restart", "seeds=[1]").status == 0


@pytest.mark.parametrize("value", ["2024-01-01", "${x}", "1e-3", "null-island", "yes", "a: b", "~/x", "[a"])
def test_text_is_taken_as_it_is_written(command: Command, toy: str, value: str) -> None:
    answer = command("run", toy, f"note={value}", "seeds=[1]", "methods={one: 0.1}")
    assert answer.status == 0
    record = yaml.safe_load((folder_of(answer.last) / "config.yaml").read_text())
    assert record["note"] == value


@pytest.mark.parametrize("root", ["2024-01-01", "${oc.env:HOME}/x", "1e-3"])
def test_a_root_of_data_is_taken_as_it_is_written(command: Command, root: str) -> None:
    assert command("check", "quickstart.yaml", f"data.root={root}").status == 0
    assert tasks.read_experiment("quickstart.yaml", [f"data.root={root}"]).config.data.root == root


@pytest.mark.parametrize("name", ["digits", "digits-c:fog:3", "scenes/shape", "folder:photos", "pairs:masks"])
def test_check_of_a_data_set_names_the_command_for_it(command: Command, name: str) -> None:
    answer = command("check", name)
    assert answer.status == 2
    assert (
        f"{name} is a data set, not a configuration. Check it by: vlprompt data check {name}"
        in answer.err.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ((), ["name a configuration", "vlprompt run quickstart.yaml", "vlprompt list configs"]),
        (("quikstart.yaml",), ["unknown configuration 'quikstart.yaml'", "Did you mean 'quickstart.yaml'"]),
        (("toy.yaml", "sedes=[1]", "nmae=x"), ["2 problems", "did you mean 'seeds'", "did you mean 'name'"]),
        (("toy.yaml", "seeds"), ["'seeds': an override looks like dotted.key=value"]),
        (("toy.yaml", "train.seed=3"), ["write protocol.seeds=[3]"]),
        (("toy.yaml", "--on", "proceses:2"), ["unknown executor 'proceses'", "Did you mean 'processes'"]),
        (("toy.yaml", "--on", "processes:0"), ["a number of processes above 0"]),
        (("other.yaml",), ["unknown task 'toi'", "Did you mean 'toy'"]),
        (("no_task.yaml",), ["task: required"]),
        (("broken.yaml",), ["broken.yaml"]),
    ],
)
def test_mistakes_are_messages(
    command: Command, toy: str, arguments: tuple[str, ...], messages: list[str]
) -> None:
    Path("other.yaml").write_text("task: toi\n")
    Path("no_task.yaml").write_text("name: x\n")
    Path("broken.yaml").write_text("name: [x\n")
    answer = command("run", *arguments)
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    for message in messages:
        assert message in answer.err


def test_a_wrong_option_is_a_users_mistake_too(command: Command, toy: str) -> None:
    answer = command("run", toy, "--restrat")
    assert answer.status == 2
    assert "--restart" in answer.err


def test_the_python_function_does_the_same(command: Command, toy: str) -> None:
    from vlprompt import run

    outcome = run(toy, ["seeds=[1]"])
    answer = command("run", toy, "seeds=[1]")
    assert folder_of(answer.last) == outcome.folder
    assert "finished before" in answer.out
    assert outcome.exit_code == 0
    assert run(toy, ["seeds=[1]"]).finished_before
