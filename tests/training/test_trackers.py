"""Trackers: the real packages, offline, and what can be read back of them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import vlprompt
from tests.commands import Command
from tests.training.toys import ToyModule, toy_batches
from vlprompt.core.errors import CheckpointError, ConfigError, UnknownNameError, VLPromptError
from vlprompt.experiments.folder import RunFolder
from vlprompt.experiments.tasks import read_experiment
from vlprompt.training import trackers
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trackers import Tracker, check_trackers
from vlprompt.training.trainer import Trainer

Curve = list[tuple[int, float]]
RESULT = {"accuracy": 0.75, "new/accuracy": 0.5}


class Interrupt(Callback):
    """Raises after an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        if record["epoch"] == self.epoch:
            raise InterruptedError


def train(name: Any, folder: Path, *more: Callback, resume: bool = False) -> list[dict[str, Any]]:
    """Train a toy for four epochs with a tracker."""
    options = TrainOptions(epochs=4, batch_size=25, lr=0.05, checkpoint_seconds=0.0)
    callbacks = [*more, Tracker(name, "a project", folder)]
    trainer = Trainer(ToyModule(), toy_batches(options), options, folder, callbacks=callbacks)
    return trainer.run(resume).history


def interrupted(name: Any, folder: Path) -> list[dict[str, Any]]:
    """Train with a tracker, stop behind the second epoch's checkpoint, and go on; then log a test figure."""
    with pytest.raises(InterruptedError):
        train(name, folder, Interrupt(2))
    history = train(name, folder, resume=True)
    Tracker(name, "a project", folder).log_result(RESULT)
    return history


def curve(history: list[dict[str, Any]], key: str = "loss") -> Curve:
    return [(record["epoch"], pytest.approx(record[key], rel=1e-5)) for record in history]  # type: ignore[misc]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and the packages' own ways to stay offline and write there."""
    monkeypatch.chdir(tmp_path)
    for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.slow
def test_tensorboard_events_are_one_curve_after_an_interruption(offline: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = interrupted("tensorboard", offline / "cell")
    events = EventAccumulator(str(offline / "cell"))
    events.Reload()
    results = {f"result/{name}" for name in RESULT}
    assert set(events.Tags()["scalars"]) == {"loss", "fit", "size", "lr", *results}
    for name, value in RESULT.items():
        assert [event.value for event in events.Scalars(f"result/{name}")] == [value]
    for key in ("loss", "lr"):
        assert [(event.step, event.value) for event in events.Scalars(key)] == curve(history, key)
    left = {path.name.partition(".")[0] for path in (offline / "cell").iterdir()}
    assert left == {"events", "checkpoint"}


@pytest.mark.slow
def test_wandb_offline_holds_every_number(offline: Path) -> None:
    pytest.importorskip("wandb")
    history = interrupted("wandb", offline / "runs" / "a" / "0123" / "cells" / "one")
    folders = sorted((offline / "wandb").glob("offline-run-*"))
    # One run, in three sittings: offline-run-TIME-ID, and a number behind it where two began in one second.
    assert len({folder.name.split("-")[3] for folder in folders}) == 1

    points: dict[int, float] = {}
    results: list[float] = []
    for folder in folders:
        (file,) = folder.glob("run-*.wandb")
        points |= wandb_points(file, "loss")
        results += wandb_points(file, "result/new/accuracy").values()
    assert sorted(points.items()) == curve(history)
    assert results == [0.5]


def wandb_points(file: Path, key: str) -> dict[int, float]:
    """Return step to value of what wandb keeps to be sent later."""
    from wandb.proto import wandb_internal_pb2

    points = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            if key in values:
                points[int(values["_step"])] = values[key]
    return points


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format: blocks of 32 KiB, pieces with a header of 7 bytes."""
    whole, block, header, place = b"", 32768, 7, 7  # the file has a header of 7 bytes too
    while place + header <= len(data):
        if block - place % block < header:  # too little is left for a header
            place += block - place % block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_mlflow_in_a_local_database_holds_every_number_and_the_options(offline: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    history = interrupted("mlflow", offline / "runs" / "a" / "0123" / "cells" / "one")

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "a project"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "a/0123/one"
    assert run.data.params["epochs"] == "4"
    assert run.data.params["lr"] == "0.05"
    points = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert sorted(points.items()) == curve(history)
    assert run.info.status == "FINISHED"
    assert {name: run.data.metrics[f"result/{name}"] for name in RESULT} == RESULT


@pytest.mark.slow
def test_trackio_in_a_local_folder_holds_every_number(offline: Path) -> None:
    pytest.importorskip("trackio")
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.training.test_trackers import interrupted
history = interrupted("trackio", Path("runs/a/0123/cells/one"))
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("a project")
logs = [SQLiteStorage.get_logs("a project", run) for run in runs]
print(json.dumps([history, runs, logs]))
"""
    # In a process of its own: trackio reads its settings once, when it is imported.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    history, runs, (logs,) = json.loads(done.stdout.splitlines()[-1])
    assert runs == ["a/0123/one"]
    points = {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}
    assert sorted(points.items()) == curve(history)
    assert [entry["result/accuracy"] for entry in logs if "result/accuracy" in entry] == [0.75]


CONFIG = """
task: classification
name: tracked
output: {output}
data: {{name: digits, validate_on: none}}
learner: {{name: coop, context_length: 2}}
protocol: {{shots: [1]}}
train: {{epochs: 1, batch_size: 8}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(output=tmp_path / "runs"))
    return path


@pytest.mark.slow
def test_a_run_is_tracked_where_its_configuration_says_so(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = config.read_text()
    learner = "learner: {name: coop, context_length: 2}"
    assert learner in text
    config.write_text(text.replace(learner, "methods: {coop: {context_length: 2}, zero_shot: {}}"))
    outcome = vlprompt.run(config, ["tracking.trackers=[tensorboard]"])
    frame = outcome.frame()
    cells = {path.name.partition("_digits")[0]: path for path in (outcome.folder / "cells").iterdir()}
    assert sorted(cells) == ["coop", "zero_shot"]
    for method, cell in cells.items():
        events = EventAccumulator(str(cell))
        events.Reload()
        assert ("loss" in events.Tags()["scalars"]) == (method == "coop")

        (tracked,) = events.Scalars("result/accuracy")
        (value,) = frame[(frame.method == method) & (frame.metric == "accuracy")].value
        assert tracked.value == pytest.approx(value)


def test_a_tracker_that_cannot_take_a_result_loses_no_cell(
    config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    config.write_text(config.read_text().replace("{name: coop, context_length: 2}", "{name: zero_shot}"))
    outcome = vlprompt.run(config, ["tracking.trackers=[mlflow]"])
    assert outcome.failures == []
    assert "the tracker mlflow can't start" in caplog.text
    assert "The results of the cell are kept." in caplog.text


@pytest.mark.slow
def test_a_name_that_a_tracker_does_not_take_is_one_sentence(offline: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(VLPromptError, match=r"the tracker mlflow can't take the result: .*@sketch"):
        Tracker("mlflow", "a project", offline / "cell").log_result({"scenes/shape@sketch/accuracy": 0.5})


def test_trackers_are_no_part_of_what_a_run_is(config: Path) -> None:
    tracked = read_experiment(config, ["tracking.trackers=[wandb,mlflow]", "tracking.project=mine"]).config
    plain = read_experiment(config).config
    assert plain.tracking.trackers == []
    assert RunFolder(tracked, {}).path == RunFolder(plain, {}).path


def test_a_tracker_that_does_not_exist_is_named_with_those_that_do(config: Path, command: Command) -> None:
    done = command("run", config, "tracking.trackers=[tensorbord]")
    assert done.status == 2
    assert "tracking.trackers.0" in done.err
    assert "'tensorboard', 'wandb', 'mlflow' or 'trackio'" in done.err
    with pytest.raises(UnknownNameError, match=r"unknown tracker 'wandbb'\. Did you mean 'wandb'"):
        check_trackers(["wandbb"])


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which no tracker is installed."""

    def absent(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(trackers, "version", absent)


@pytest.mark.usefixtures("without_packages")
def test_a_tracker_that_is_not_installed_is_one_sentence_before_anything_runs(
    config: Path, command: Command
) -> None:
    done = command("run", config, "tracking.trackers=[wandb,trackio]")
    assert done.status == 2
    for name in ("wandb", "trackio"):
        assert f"the tracker {name} isn't installed: pip install 'vlprompt[{name}]'." in done.err
    assert not (config.parent / "runs").exists()

    planned = command("run", config, "tracking.trackers=[mlflow]", "--dry-run")
    assert planned.status == 1
    assert "missing: the tracker mlflow isn't installed: pip install 'vlprompt[mlflow]'." in planned.out
    with pytest.raises(ConfigError, match=r"pip install 'vlprompt\[tensorboard\]'"):
        Tracker("tensorboard", folder=config.parent)


def test_nothing_is_tracked_unless_asked(config: Path) -> None:
    outcome = vlprompt.run(config)
    (cell,) = (outcome.folder / "cells").iterdir()
    assert not list(cell.glob("events.*"))
    assert not (cell / "trackers.json").exists()


def test_a_tracker_that_cannot_start_is_one_sentence_and_begins_no_training(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    (offline / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(
        VLPromptError, match=r"the tracker mlflow can't start: .*MLFLOW_TRACKING_URI"
    ) as raised:
        train("mlflow", offline / "cell")
    assert "\n" not in str(raised.value)
    assert not (offline / "cell" / "checkpoint").exists()


def test_what_tensorboard_needs_and_what_damaged_notes_do(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError, match="tensorboard writes into the training's folder"):
        Tracker("tensorboard")

    with pytest.raises(InterruptedError):
        train("tensorboard", tmp_path, Interrupt(1))
    (tmp_path / "trackers.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"trackers\.json is damaged .*Delete it"):
        train("tensorboard", tmp_path, resume=True)
