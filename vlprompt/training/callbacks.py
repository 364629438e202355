"""What happens beside training: progress on a terminal, plain lines elsewhere, TensorBoard events."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlprompt.training.options import TrainOptions
from vlprompt.training.state import Progress as RunProgress

__all__ = ["Callback", "ProgressBar", "TensorBoard", "TrainingView", "default_callbacks"]

log = logging.getLogger("vlprompt.training")


class TrainingView(Protocol):
    """What a callback may read of the trainer."""

    @property
    def options(self) -> TrainOptions:
        """The run's options."""

    @property
    def progress(self) -> RunProgress:
        """Where the run stands."""


class Callback:
    """Base class: override what you need. Called on the main process only; must not change the run."""

    def on_start(self, trainer: TrainingView) -> None:
        """Called before the first step, also after a resume."""

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        """Called after each optimiser step with the losses of its samples."""

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Called after each epoch with the record that went into the history."""

    def on_end(self, trainer: TrainingView) -> None:
        """Called once, also when training raised."""


class ProgressBar(Callback):
    """A rich bar over epochs on a terminal; one log line per tenth of the run elsewhere.

    Args:
        title: What is trained.
        console: Where the bar is drawn; standard error by default.
    """

    def __init__(self, title: str = "train", console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def on_start(self, trainer: TrainingView) -> None:
        """Open the bar if standard error is a terminal."""
        if not self.console.is_terminal:
            return

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(
            self.title, total=trainer.options.epochs, completed=trainer.progress.epoch, note=""
        )
        self._bar.start()

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Show the epoch's loss and validation score."""
        keys = [key for key in ("loss", "val/accuracy", "val/dice") if key in record]
        note = " ".join(f"{key} {record[key]:.4f}" for key in keys)

        finished = record["epoch"] + 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif finished % max(1, trainer.options.epochs // 10) == 0:
            log.info("%s epoch %d/%d %s", self.title, finished, trainer.options.epochs, note)

    def on_end(self, trainer: TrainingView) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()


class TensorBoard(Callback):
    """Write every number of an epoch's record as TensorBoard events.

    Args:
        folder: Where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, trainer: TrainingView) -> None:
        """Open the event file; ``purge_step`` hides what a killed session wrote past its last checkpoint."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.progress.epoch)

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Add one event per number."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])

    def on_end(self, trainer: TrainingView) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def default_callbacks(title: str = "train", folder: Path | None = None) -> list[Callback]:
    """Return a progress bar, and TensorBoard events if there is a folder for them."""
    callbacks: list[Callback] = [ProgressBar(title)]
    if folder is not None:
        callbacks.append(TensorBoard(folder))
    return callbacks
