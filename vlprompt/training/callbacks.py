"""What happens beside training: progress on a terminal, plain lines elsewhere, TensorBoard events."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from vlprompt.training.trainer import Trainer

__all__ = ["Callback", "ProgressBar", "TensorBoard", "default_callbacks"]

log = logging.getLogger("vlprompt.training")


class Callback:
    """Base class: override what you need. Called on the main process only; must not change the run."""

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step, also after a resume."""

    def on_step(self, trainer: Trainer, losses: dict[str, float]) -> None:
        """Called after each optimiser step with the losses of its samples."""

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Called after each epoch with the record that went into the history."""

    def on_end(self, trainer: Trainer) -> None:
        """Called once, also when training raised."""


class ProgressBar(Callback):
    """A rich bar over epochs on a terminal; one log line per tenth of the run elsewhere."""

    def __init__(self, title: str = "train", console: Console | None = None) -> None:
        self.title, self.console = title, console or Console(stderr=True)
        self._bar: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the bar if somebody is watching."""
        if not self.console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True
        )
        self._task = self._bar.add_task(
            self.title, total=trainer.options.epochs, completed=trainer.progress.epoch, note=""
        )
        self._bar.start()

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Show the epoch's loss and validation score."""
        note = " ".join(f"{k} {record[k]:.4f}" for k in ("loss", "val/accuracy", "val/dice") if k in record)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif (record["epoch"] + 1) % max(1, trainer.options.epochs // 10) == 0:
            log.info("%s epoch %d/%d %s", self.title, record["epoch"] + 1, trainer.options.epochs, note)

    def on_end(self, trainer: Trainer) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()


class TensorBoard(Callback):
    """Write every number of an epoch's record as TensorBoard events into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the event file; ``purge_step`` hides what a killed session wrote past its last checkpoint."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.progress.epoch)

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Add one event per number."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])

    def on_end(self, trainer: Trainer) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


def default_callbacks(title: str = "train", folder: Path | None = None) -> list[Callback]:
    """Return a progress bar, and TensorBoard events if there is a folder for them."""
    return [ProgressBar(title), *([TensorBoard(folder)] if folder else [])]
