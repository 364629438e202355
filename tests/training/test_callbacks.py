"""Callbacks: when they are called, what they may ask for, and what happens when they raise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt
from tests.training.toys import ToyModule, toy_batches
from vlprompt.core.errors import VLPromptError
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

CONFIG = """
task: classification
name: callbacks
output: {output}
data: {{name: digits, validate_on: none}}
learner: {{name: coop, context_length: 2}}
protocol: {{shots: [1], seeds: {seeds}}}
train: {{epochs: 2, batch_size: 8, lr: 0.01}}
"""


class Diary(Callback):
    """Writes down what it hears, and does one thing at one moment."""

    def __init__(self, name: str, entries: list[str], at: str = "", error: bool = False) -> None:
        self.name = name
        self.entries = entries
        self.at = at
        self.error = error

    def _write(self, event: str, trainer: TrainingView | None) -> None:
        self.entries.append(f"{self.name} {event}")
        if event == self.at and self.error:
            raise InterruptedError(self.name)
        if event == self.at and trainer is not None:
            trainer.stop()

    def on_start(self, trainer: TrainingView) -> None:
        self._write("start", trainer)

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        assert losses["loss"] == pytest.approx(losses["fit"] + losses["size"])
        self._write(f"step {trainer.progress.epoch}.{trainer.progress.step}", trainer)

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        assert record is trainer.progress.history[-1]
        self._write(f"epoch {record['epoch']}", trainer)

    def on_end(self, trainer: TrainingView) -> None:
        self._write("end", trainer)


def trainer_of(*callbacks: Callback, folder: Path | None = None, seed: int = 0, **changes: Any) -> Trainer:
    options = TrainOptions(
        **{"epochs": 2, "batch_size": 25, "lr": 0.05, "schedule": "constant", "warmup_epochs": 0, **changes}
    )
    return Trainer(ToyModule(0.3, seed), toy_batches(options), options, folder, callbacks=callbacks)


def test_the_order_of_calls() -> None:
    entries: list[str] = []
    trainer_of(Diary("a", entries), Diary("b", entries)).run()
    moments = ["start", "step 0.1", "step 0.2", "epoch 0", "step 1.1", "step 1.2", "epoch 1"]
    assert entries == [*(f"{name} {event}" for event in moments for name in "ab"), "b end", "a end"]


@pytest.mark.parametrize("moment", ["step 1.1", "epoch 1"])
def test_stopping_ends_after_the_epoch_with_what_it_has_learned(tmp_path: Path, moment: str) -> None:
    stopped = trainer_of(Diary("a", [], at=moment), folder=tmp_path, epochs=9)
    history = stopped.run().history
    short = trainer_of(epochs=2)
    assert history == short.run().history
    for name, tensor in short.module.trainable_state().items():
        assert torch.equal(tensor, stopped.module.trainable_state()[name])

    # It stays ended where it is resumed, without the callback.
    again = trainer_of(folder=tmp_path, epochs=9, seed=5)
    assert again.run(resume=True).history == history
    for name, tensor in short.module.trainable_state().items():
        assert torch.equal(tensor, again.module.trainable_state()[name])


def test_stopping_before_the_first_step_trains_nothing() -> None:
    trainer = trainer_of(Diary("a", [], at="start"))
    assert trainer.run().history == []
    for name, tensor in ToyModule(0.3).trainable_state().items():
        assert torch.equal(tensor, trainer.module.trainable_state()[name])


@pytest.mark.parametrize(
    ("moment", "last"),
    [
        ("start", ["a start", "b start", "b end", "a end"]),
        ("step 0.1", ["a step 0.1", "b step 0.1", "c end", "b end", "a end"]),
        ("epoch 1", ["a epoch 1", "b epoch 1", "c end", "b end", "a end"]),
        ("end", ["c epoch 1", "c end", "b end", "a end"]),
    ],
)
def test_an_exception_reaches_the_caller_and_every_start_has_its_end(moment: str, last: list[str]) -> None:
    entries: list[str] = []
    diaries = [Diary("a", entries), Diary("b", entries, at=moment, error=True), Diary("c", entries)]
    with pytest.raises(InterruptedError, match="b"):
        trainer_of(*diaries).run()
    assert entries[-len(last) :] == last
    assert sum(entry.endswith("start") for entry in entries) == sum(
        entry.endswith("end") for entry in entries
    )


def test_an_exception_leaves_the_checkpoint_to_continue_from(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        trainer_of(Diary("a", [], at="epoch 1", error=True), folder=tmp_path, checkpoint_seconds=0.0).run()
    again = trainer_of(folder=tmp_path, checkpoint_seconds=0.0, seed=5)
    assert again.run(resume=True).history == trainer_of().run().history


class Listener(Callback):
    """Counts trainings and keeps what is said of cells."""

    def __init__(self, fails: bool = False) -> None:
        self.epochs: list[int] = []
        self.cells: list[tuple[dict[str, Any], dict[str, float]]] = []
        self.fails = fails

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        self.epochs.append(record["epoch"])
        if self.fails:
            raise InterruptedError("no more of this")

    def on_cell(self, cell: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self.cells.append((dict(cell), dict(metrics)))


def config(folder: Path, seeds: str = "[1, 2]") -> Path:
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", seeds=seeds))
    return path


def test_a_run_calls_them_in_every_training_and_after_every_cell(tmp_path: Path) -> None:
    listener = Listener()
    outcome = vlprompt.run(config(tmp_path), callbacks=[listener])
    assert listener.epochs == [0, 1, 0, 1]
    assert [cell["seed"] for cell, _ in listener.cells] == [1, 2]
    accuracies = [metrics["accuracy"] for _, metrics in listener.cells]
    assert outcome.metrics["accuracy"] == pytest.approx(sum(accuracies) / 2)

    # Nothing is left to do, so nothing is heard of it.
    assert vlprompt.run(config(tmp_path), callbacks=[silent := Listener()]).finished_before
    assert (silent.epochs, silent.cells) == ([], [])


def test_a_cell_whose_callback_raises_fails_and_may_be_run_again(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError, match="no more of this"):  # the only reason: it is said as it is
        vlprompt.run(config(tmp_path, "[1]"), callbacks=[Listener(fails=True)])
    assert vlprompt.run(config(tmp_path, "[1]")).exit_code == 0


@pytest.mark.slow
def test_processes_train_with_copies_and_cells_are_told_here(tmp_path: Path) -> None:
    listener = Listener()
    vlprompt.run(config(tmp_path), on="processes:1", callbacks=[listener])
    assert listener.epochs == []
    assert sorted(cell["seed"] for cell, _ in listener.cells) == [1, 2]
    with pytest.raises(VLPromptError, match="no more of this"):
        vlprompt.run(config(tmp_path, "[3]"), on="processes:1", callbacks=[Listener(fails=True)])
