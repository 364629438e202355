"""Which callbacks take part in a training: a progress bar, and what the run that it belongs to asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import VLPromptError
from vlprompt.training.callbacks import Callback, ProgressBar
from vlprompt.training.options import TrackerName
from vlprompt.training.trackers import Tracker

__all__ = ["default_callbacks", "run_callbacks", "track_result", "using_callbacks"]

log = logging.getLogger("vlprompt.training")


@dataclass(frozen=True)
class _Run:
    """What a run asks for in all of its trainings."""

    trackers: tuple[TrackerName, ...] = ()
    project: str = ""
    callbacks: tuple[Callback, ...] = ()


_present: ContextVar[_Run] = ContextVar("run callbacks", default=_Run())  # noqa: B039  # it is frozen


@contextmanager
def using_callbacks(
    trackers: Sequence[TrackerName], project: str, callbacks: Sequence[Callback] = ()
) -> Iterator[None]:
    """Let everything that :func:`run_callbacks` returns inside be for a run.

    Args:
        trackers: See :class:`Tracker`, one for every training.
        project: See :class:`Tracker`.
        callbacks: Take part in every training.
    """
    token = _present.set(_Run(tuple(trackers), project, tuple(callbacks)))
    try:
        yield
    finally:
        _present.reset(token)


def run_callbacks(folder: Path | None) -> list[Callback]:
    """Return what the present run asks for in a training: its trackers and callbacks; nothing outside of a run.

    Args:
        folder: The training's own; one without a folder is a trial or the like, and is not tracked.
    """
    run = _present.get()
    if folder is None:
        return list(run.callbacks)
    return [*(Tracker(name, run.project, folder) for name in run.trackers), *run.callbacks]


def track_result(folder: Path, numbers: Mapping[str, float]) -> None:
    """Hand what a cell measured to the trackers of the present run; outside of a run, nothing is done.

    The numbers are kept without trackers too, so one that can't take them is a warning.

    Args:
        folder: The cell's.
        numbers: Metric to value.
    """
    run = _present.get()
    for name in run.trackers:
        try:
            Tracker(name, run.project, folder).log_result(numbers)
        except VLPromptError as error:
            log.warning("%s: %s The results of the cell are kept.", folder.name, error)


def default_callbacks(title: str = "train", folder: Path | None = None) -> list[Callback]:
    """Return a progress bar, and what the present run asks for (see :func:`run_callbacks`)."""
    return [ProgressBar(title), *run_callbacks(folder)]
