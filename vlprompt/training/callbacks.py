"""What happens beside training: the base class of callbacks, and progress on a terminal or as plain lines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlprompt.core.options import check_type
from vlprompt.training.options import TrainOptions
from vlprompt.training.state import Progress as RunProgress

__all__ = ["Callback", "ProgressBar", "TrainingView", "check_callbacks"]

log = logging.getLogger("vlprompt.training")


class TrainingView(Protocol):
    """What a callback may read of the trainer, and the one thing it may ask of it."""

    @property
    def options(self) -> TrainOptions:
        """The run's options."""

    @property
    def progress(self) -> RunProgress:
        """Where the run stands."""

    def stop(self) -> None:
        """End the training after this epoch; it stays ended where the run is resumed."""


class Callback:
    """Base class: every method does nothing; override what you need.

    :func:`vlprompt.fit` and its relatives call the methods about a training, :func:`vlprompt.run` calls them in every
    training of its cells and adds :meth:`on_cell`. Of several processes of one training, the main one calls them.
    Several callbacks are called in the order of their list, only :meth:`on_end` in reverse. An exception that one
    raises ends the training and reaches the caller (in a run: the cell fails); the last checkpoint stays as it was.

    A callback must not change the module or the options. What it changes by :meth:`TrainingView.stop` is no part of a
    configuration, so a run that was ended by a callback can't be repeated from its configuration alone.
    """

    def on_start(self, trainer: TrainingView) -> None:
        """Called before the first step, also after a resume."""

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        """Called after each optimiser step with the losses of its samples."""

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Called after each epoch with what went into the history: ``epoch``, ``lr``, losses, ``val/...``."""

    def on_end(self, trainer: TrainingView) -> None:
        """Called once for each :meth:`on_start`, also when that, the training or another callback raised."""

    def on_cell(self, cell: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Called when a cell of a run has finished, in the process that called :func:`vlprompt.run`.

        Args:
            cell: The cell's coordinates: method, data, shots, seed ...
            metrics: What it measured; the figure of a part, or of one of several data sets, has that before its name.
        """


def check_callbacks(callbacks: Sequence[Callback] | None) -> None:
    """Refuse what is no list of callbacks.

    Raises:
        DataError: Says what was given in place of one.
    """
    for callback in callbacks or ():
        check_type(callback, Callback, "a callback", "the constructor of a subclass of Callback")


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
