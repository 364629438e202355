"""The run engine: what is kept, what runs again, who may write, and that nothing finished is ever lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.toys import Toy, ToyConfig
from vlprompt.core.errors import CheckpointError, DataError, UnknownNameError, VLPromptError
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results
from vlprompt.experiments.runner import RunOutcome, describe_plan, run_experiment

ROOT = Path(__file__).parents[2]
WHOLE = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv", "table.tex", "config.yaml")


def toy(folder: Path, **changes: Any) -> Toy:
    return Toy(ToyConfig(task="toy", name="toy", output=str(folder), **changes))


def content(outcome: RunOutcome) -> dict[str, bytes]:
    return {name: (outcome.folder / name).read_bytes() for name in WHOLE if name != "config.yaml"}


def test_a_run_leaves_everything_the_contract_names(tmp_path: Path) -> None:
    outcome = run_experiment(toy(tmp_path))
    for name in (*WHOLE, "environment.json", "sources.json"):
        assert (outcome.folder / name).is_file()
    assert outcome.folder.parent == tmp_path / "toy"
    assert outcome.exit_code == 0
    frame = outcome.frame()
    assert list(frame.columns) == ["method", "data", "seed", "part", "metric", "value"]
    assert len(frame) == 2 * 2 * 2 * 2
    stored = Results.read(outcome.folder / "results.jsonl")
    assert [line.record() for line in stored.lines] == [line.record() for line in outcome.results.lines]
    assert outcome.metrics["runs"] == 8
    assert outcome.metrics["a/size"] == 1000
    assert "Gain over one" in outcome.text


def test_timings_are_kept_apart(tmp_path: Path) -> None:
    """A clock or a process number must not reach what a continued run has to reproduce."""
    outcome = run_experiment(toy(tmp_path))
    pid = str(float(os.getpid()))
    for name in WHOLE:
        assert pid not in (outcome.folder / name).read_text()
    timings = outcome.folder / "cells" / "one_a_seed1" / "timings.json"
    assert json.loads(timings.read_text()) == {"training": float(os.getpid())}


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    first = run_experiment(toy(tmp_path))
    times = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    again = run_experiment(toy(tmp_path))
    assert again.finished_before
    assert not first.finished_before
    assert again.metrics == first.metrics
    assert again.text == first.text
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}


def test_restart_moves_the_old_run_aside(tmp_path: Path) -> None:
    first = run_experiment(toy(tmp_path))
    old = content(first)
    (first.folder / "mine.txt").write_text("a note")
    for number in (1, 2):
        again = run_experiment(toy(tmp_path), restart=True)
        assert content(again) == old
        assert (first.folder.parent / f"{first.folder.name}.{number}").is_dir()
    assert (first.folder.parent / f"{first.folder.name}.1" / "mine.txt").read_text() == "a note"
    assert not (first.folder / "mine.txt").exists()


def test_one_failing_cell_costs_itself_and_what_needs_it(tmp_path: Path) -> None:
    whole = run_experiment(toy(tmp_path / "whole"))
    outcome = run_experiment(toy(tmp_path, fail=["two_a_seed1"]))
    assert outcome.exit_code == 1
    assert outcome.failures == [
        "two_a_seed1: two_a_seed1 can't be read.",
        "two_b_seed1: it needs two_a_seed1, which did not finish",
    ]
    assert len(outcome.results) == len(whole.results) - 4
    failure = json.loads((outcome.folder / "cells" / "two_a_seed1" / "failure.json").read_text())
    assert failure["message"] == "two_a_seed1 can't be read."
    assert "DataError" in failure["stack"]
    assert "two_a_seed1" in (outcome.folder / "report.html").read_text()


def test_what_failed_runs_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    whole = run_experiment(toy(tmp_path / "whole"))
    obstacle = tmp_path / "obstacle"
    obstacle.touch()
    changes = {"fail": ["two_a_seed1"], "fail_while": str(obstacle)}
    first = run_experiment(toy(tmp_path, **changes))
    assert len(first.failures) == 2
    times = {path: path.stat().st_mtime_ns for path in first.folder.glob("cells/*/cell.json")}

    obstacle.unlink()
    second = run_experiment(toy(tmp_path, **changes))
    assert second.folder == first.folder
    assert second.failures == []
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert not list(second.folder.glob("cells/*/failure.json"))
    assert content(second)["results.jsonl"] == content(whole)["results.jsonl"]
    assert content(second)["metrics.json"] == content(whole)["metrics.json"]


def test_nothing_finished_for_one_reason_raises_it(tmp_path: Path) -> None:
    names = [cell.name for cell in toy(tmp_path).cells() if not cell.needs]
    with pytest.raises(DataError, match="can't be read"):
        run_experiment(toy(tmp_path, methods={"one": 0.1}, seeds=[1], fail=names))


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_processes_give_the_very_files_of_one(tmp_path: Path, processes: int) -> None:
    serial = run_experiment(toy(tmp_path / "serial"))
    several = run_experiment(toy(tmp_path / "several"), on=f"processes:{processes}")
    assert several.failures == []
    assert content(several) == content(serial)


def test_a_killed_worker_is_a_failed_cell(tmp_path: Path) -> None:
    outcome = run_experiment(toy(tmp_path, kill=["two_a_seed1"]), on="processes:2")
    assert outcome.exit_code == 1
    killed, hopeless = outcome.failures
    assert killed == "two_a_seed1: the process that ran it was killed or crashed {SIGKILL(-9)}."
    assert hopeless.startswith("two_b_seed1: it needs two_a_seed1")
    assert len(outcome.results.select("accuracy")) == 6


def test_resume_needs_something_to_continue_and_says_what_differs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run in"):
        run_experiment(toy(tmp_path), resume=True)
    run_experiment(toy(tmp_path))
    with pytest.raises(CheckpointError, match=r"differs in seeds \(\[1, 2\] there, \[3\] here\)"):
        run_experiment(toy(tmp_path, seeds=[3]), resume=True)
    assert run_experiment(toy(tmp_path), resume=True).finished_before
    with pytest.raises(VLPromptError, match="give one of them"):
        run_experiment(toy(tmp_path), resume=True, restart=True)


def test_other_files_are_another_run(tmp_path: Path) -> None:
    class WithFiles(Toy):
        def sources(self) -> dict[str, str]:
            return {"photos": fingerprint}

    config = ToyConfig(task="toy", name="toy", output=str(tmp_path))
    fingerprint = "before"
    first = run_experiment(WithFiles(config))
    fingerprint = "after"
    second = run_experiment(WithFiles(config))
    assert second.folder != first.folder
    assert first.folder.is_dir()
    fingerprint = "later"
    with pytest.raises(CheckpointError, match="differs in the files of photos"):
        run_experiment(WithFiles(config), resume=True)


def test_two_runs_in_one_folder_are_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tests.experiments.toys import Toy, ToyConfig
        from vlprompt.experiments.runner import run_experiment

        class Slow(Toy):
            def run(self, cell, folder):
                print("running", flush=True)
                time.sleep(60)

        run_experiment(Slow(ToyConfig(task="toy", name="toy", output={str(tmp_path)!r})))
    """)
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "running\n"
        with pytest.raises(CheckpointError, match=rf"is being written by process {running.pid} on "):
            run_experiment(toy(tmp_path))
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert run_experiment(toy(tmp_path)).failures == []


@pytest.mark.slow
def test_killed_anywhere_and_run_again_ends_with_the_same_files(tmp_path: Path) -> None:
    whole = run_experiment(toy(tmp_path / "whole"))
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.experiments.toys import Toy, ToyConfig
        from vlprompt.experiments.runner import run_experiment
        run_experiment(Toy(ToyConfig(task="toy", name="toy", output={str(tmp_path / "killed")!r})))
    """)
    for cells in (1, 3, 6):
        running = subprocess.Popen([sys.executable, "-c", program])
        deadline = time.monotonic() + 60
        while running.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "killed").glob("toy/*/cells/*/cell.json"))) >= cells:
                running.send_signal(signal.SIGKILL)
        running.wait()
    again = run_experiment(toy(tmp_path / "killed"))
    assert content(again) == content(whole)


def test_the_plan_says_what_would_run(tmp_path: Path) -> None:
    class Lacking(Toy):
        def missing(self) -> list[str]:
            return ["photos: there is no folder."]

    text = describe_plan(Lacking(ToyConfig(task="toy", name="toy", output=str(tmp_path))))
    assert "8 cells" in text
    assert "two_b_seed1  needs two_a_seed1" in text
    assert "missing: photos: there is no folder." in text
    assert not list(tmp_path.iterdir())
    run_experiment(toy(tmp_path))
    assert "one_a_seed1 (finished)" in describe_plan(toy(tmp_path))


def test_labels_that_share_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VLPromptError, match="two cells of toy would share the folder 'A-b_a_seed1'"):
        run_experiment(toy(tmp_path, methods={"a-b": 0.1, "A-b": 0.2}))


def test_labels_that_differ_in_signs_alone_have_folders_of_their_own(tmp_path: Path) -> None:
    labels = ["my dog", "my_dog", "my-dog", "../../my dog", ".."]
    outcome = run_experiment(toy(tmp_path, methods=dict.fromkeys(labels, 0.1)))
    assert len(list((outcome.folder / "cells").iterdir())) == len(labels) * 4
    assert set(tmp_path.rglob("cell.json")) == set((outcome.folder / "cells").glob("*/cell.json"))
    assert set(outcome.results.coordinates("method")) == set(labels)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("process:2", r"unknown executor 'process'\. Did you mean 'processes'"),
        ("processes", r"--on processes:N takes a number of processes above 0; got ''"),
        ("processes:0", r"above 0; got '0'"),
        ("serial:2", r"--on serial takes no number; got '2'"),
    ],
)
def test_executors_that_do_not_exist_are_said_before_anything_is_read(
    tmp_path: Path, spec: str, message: str
) -> None:
    class Unreadable(Toy):
        def sources(self) -> dict[str, str]:
            raise DataError("the data were read first")

    experiment = Unreadable(toy(tmp_path).config)
    with pytest.raises((UnknownNameError, VLPromptError), match=message):
        run_experiment(experiment, on=spec)
    with pytest.raises(DataError, match="read first"):
        run_experiment(experiment)


def test_a_damaged_cell_says_which_file_to_delete(tmp_path: Path) -> None:
    outcome = run_experiment(toy(tmp_path))
    (outcome.folder / "done.json").unlink()
    broken = outcome.folder / "cells" / "one_a_seed1" / "cell.json"
    broken.write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(str(broken))):
        run_experiment(toy(tmp_path))


def test_names_of_cells_are_names_of_folders() -> None:
    paths = [Cell.at(data=f"folder:/some/{x}/my images/", shots=1, seed=1).name for x in "ab"]
    assert paths[0] != paths[1]
    assert paths[0].startswith("folder-my-images-")
    assert not set("/: ") & set(paths[0])
    name = Cell.at(method="coop", data="scenes/shape", shots=4, seed=2, target="scenes/shape@sketch").name
    assert name == "coop_scenes-shape_4shots_seed2_scenes-shape@sketch"
    assert len(Cell.at(method="m" * 400, seed=1).name) < 200
