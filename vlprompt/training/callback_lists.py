"""Which callbacks take part in a training: a progress bar, and what the run that it belongs to asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from vlprompt.training.callbacks import Callback, ProgressBar
from vlprompt.training.options import TrackerName
from vlprompt.training.trackers import Tracker

__all__ = ["default_callbacks", "run_callbacks", "using_callbacks"]


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


def default_callbacks(title: str = "train", folder: Path | None = None) -> list[Callback]:
    """Return a progress bar, and what the present run asks for (see :func:`run_callbacks`)."""
    return [ProgressBar(title), *run_callbacks(folder)]
