"""Trackers: numbers of epochs and results of cells go to TensorBoard, W&B, MLflow or Trackio, by accelerate.

No tracker is a dependency. Where one writes, and whether it uses a network, its own settings say
(``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_DIR`` ...); TensorBoard's events go into the training's
folder.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from vlprompt.core.errors import CheckpointError, ConfigError, UnknownNameError, VLPromptError, first_line
from vlprompt.core.files import write_json
from vlprompt.core.paths import user_path
from vlprompt.core.processes import accelerator
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrackerName

__all__ = ["Tracker", "check_trackers", "missing_trackers"]

_FILE = "trackers.json"  # in the training's folder: tracker to the name it gave the run
_TITLE_PARTS = 4  # of a cell's folder: NAME/ID/cells/CELL


class Tracker(Callback):
    """Hands every number of an epoch's record to a tracker, the step being the epoch, and the options at the start.

    A training that is resumed goes on in the same run of the tracker.

    Args:
        name: ``"tensorboard"``, ``"wandb"``, ``"mlflow"`` or ``"trackio"``.
        project: The project (of MLflow: the experiment) that the run belongs to; of no meaning to TensorBoard.
        folder: The training's; TensorBoard's events go there, and the run's name comes from it. None, which TensorBoard
            does not take, leaves the name to the tracker.

    Raises:
        UnknownNameError: For another name.
        ConfigError: If its package isn't installed, or a folder is missing; says what to do.
    """

    def __init__(
        self, name: TrackerName, project: str = "vlprompt", folder: str | Path | None = None
    ) -> None:
        check_trackers([name])
        self.name = name
        self.project = project
        self.folder = None if folder is None else user_path(folder)
        self._kind = _KINDS[name]()
        self._tracker: GeneralTracker | None = None
        if self.folder is None and self._kind.needs_folder:
            raise ConfigError(
                [f"{name} writes into the training's folder: pass folder."], f"Tracker({name!r})"
            )

    def on_start(self, trainer: TrainingView) -> None:
        """Begin the tracker's run, or go on with the one that a resumed training had."""
        progress = trainer.progress
        resumed = progress.epoch > 0 or progress.step > 0
        self._begin(trainer.options.model_dump(mode="json"), progress.epoch, resumed)

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Hand on the numbers of a record."""
        assert self._tracker is not None
        numbers = {
            key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "epoch"
        }
        self._tracker.log(numbers, step=record["epoch"])

    def on_end(self, trainer: TrainingView) -> None:
        """Close the tracker's run."""
        self._finish()

    def log_result(self, numbers: Mapping[str, float]) -> None:
        """Add what a cell measured, each number once and called ``result/NAME``, to the run of its training.

        A cell that trained nothing gets a run for it.

        Args:
            numbers: Metric to value, test figures among them.

        Raises:
            VLPromptError: If the tracker can't start, or doesn't take a number or its name.
        """
        self._begin({}, None, resumed=True)
        assert self._tracker is not None

        try:
            try:
                self._tracker.log({f"result/{name}": value for name, value in numbers.items()}, step=None)
            finally:
                self._finish()
        except Exception as error:  # each of these packages raises kinds of its own
            raise VLPromptError(
                f"the tracker {self.name} can't take the result: {first_line(error)}"
            ) from error

    def _begin(self, options: Mapping[str, Any], epoch: int | None, resumed: bool) -> None:
        """Begin the tracker's run.

        Args:
            options: Of the training; stored at the start.
            epoch: The first that will be logged; None if no epoch will be.
            resumed: Go on with the folder's earlier run, if there is one.
        """
        earlier = self._earlier() if resumed else None
        arguments = self._kind.arguments(self._title(), earlier, epoch)
        handle = accelerator(
            log_with=self.name, project_dir=None if self.folder is None else str(self.folder)
        )

        try:
            with redirect_stdout(sys.stderr):  # standard output is the caller's
                handle.init_trackers(
                    self._kind.project(self.project),
                    config=self._kind.config(options),
                    init_kwargs={self.name: arguments},
                )
        except Exception as error:  # each of these packages raises kinds of its own
            raise VLPromptError(
                f"the tracker {self.name} can't start: {first_line(error)} {self._kind.advice}".rstrip()
            ) from error

        (self._tracker,) = handle.trackers
        identifier = self._kind.identifier(self._tracker)
        if identifier and self.folder is not None:
            write_json(self.folder / _FILE, {**self._identifiers(), self.name: identifier})

    def _finish(self) -> None:
        """End the tracker's run, if one has begun."""
        if self._tracker is not None:
            tracker, self._tracker = self._tracker, None
            with redirect_stdout(sys.stderr):
                self._kind.finish(tracker)

    def _title(self) -> str | None:
        """Return a name for the run: the end of the folder's path, without what all cells have."""
        if self.folder is None:
            return None
        parts = self.folder.absolute().parts[-_TITLE_PARTS:]
        return "/".join(parts if "cells" in parts else parts[-1:]).replace("/cells/", "/")

    def _earlier(self) -> str | None:
        return self._identifiers().get(self.name)

    def _identifiers(self) -> dict[str, str]:
        """Return what the trackers of this folder called the run."""
        if self.folder is None or not (self.folder / _FILE).is_file():
            return {}
        try:
            content = json.loads((self.folder / _FILE).read_text(encoding="utf-8"))
            return {str(name): str(identifier) for name, identifier in content.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.folder / _FILE} is damaged ({error}). Delete it: trackers then begin a new run."
            ) from None


def missing_trackers(names: Iterable[str]) -> list[str]:
    """Return a sentence for every tracker whose package isn't installed: what to do."""
    return [
        f"the tracker {name} isn't installed: pip install 'vlprompt[{name}]'."
        for name in dict.fromkeys(names)
        if not any(map(_is_installed, _KINDS[name].distributions))
    ]


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that don't exist or aren't installed.

    Raises:
        UnknownNameError: Names the nearest ones.
        ConfigError: Says how to install each.
    """
    names = list(names)
    for name in names:
        if name not in _KINDS:
            raise UnknownNameError("tracker", str(name), _KINDS)
    if missing := missing_trackers(names):
        raise ConfigError(missing, "tracking.trackers")


class _Kind(ABC):
    """What differs between trackers.

    Attributes:
        distributions: Packages any one of which is enough.
        needs_folder: Whether it writes into the training's folder.
        advice: A sentence for where it can't start.
    """

    distributions: tuple[str, ...]
    needs_folder = False
    advice = ""

    def project(self, project: str) -> str:
        """Return what accelerate calls the project's name."""
        return project

    def config(self, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is stored of the options at the start."""
        return dict(options)

    @abstractmethod
    def arguments(self, title: str | None, earlier: str | None, epoch: int | None) -> dict[str, Any]:
        """Return the arguments of the package's own beginning of a run.

        Args:
            title: What to call the run.
            earlier: What :meth:`identifier` returned before the training was interrupted.
            epoch: The first that will be logged; None if no epoch will be.
        """

    def identifier(self, tracker: GeneralTracker) -> str:
        """Return what finds the run again; empty where the folder does."""
        return ""

    def finish(self, tracker: GeneralTracker) -> None:
        """End the run."""
        tracker.finish()


class _TensorBoard(_Kind):
    distributions = ("tensorboard",)
    needs_folder = True

    def project(self, project: str) -> str:
        return ""  # accelerate takes it for a folder below the training's

    def config(self, options: Mapping[str, Any]) -> None:
        """Store nothing: accelerate would add a folder with the time in its name at every start."""

    def arguments(self, title: str | None, earlier: str | None, epoch: int | None) -> dict[str, Any]:
        return (
            {} if epoch is None else {"purge_step": epoch}
        )  # hides what a killed run wrote past its last checkpoint


class _Wandb(_Kind):
    distributions = ("wandb",)
    advice = "Run `wandb login`, or set WANDB_MODE=offline."

    def arguments(self, title: str | None, earlier: str | None, epoch: int | None) -> dict[str, Any]:
        return {"name": title, "id": earlier, "resume": "allow"}

    def identifier(self, tracker: GeneralTracker) -> str:
        return str(tracker.tracker.id)


class _MLflow(_Kind):
    distributions = ("mlflow", "mlflow-skinny")
    advice = "MLFLOW_TRACKING_URI says where it writes."

    def arguments(self, title: str | None, earlier: str | None, epoch: int | None) -> dict[str, Any]:
        return {"run_name": title, "run_id": earlier}

    def identifier(self, tracker: GeneralTracker) -> str:
        return str(tracker.tracker.info.run_id)


class _Trackio(_Kind):
    distributions = ("trackio",)
    advice = "TRACKIO_DIR says where it writes."

    def arguments(self, title: str | None, earlier: str | None, epoch: int | None) -> dict[str, Any]:
        return {"name": earlier or title, "resume": "allow" if earlier else "never", "embed": False}

    def identifier(self, tracker: GeneralTracker) -> str:
        return str(tracker.tracker.name)

    def finish(self, tracker: GeneralTracker) -> None:
        import trackio  # an extra

        trackio.finish()  # accelerate ends the run without saying so, and it would be ended again at exit


_KINDS: dict[str, type[_Kind]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _is_installed(distribution: str) -> bool:
    # Not by looking for a module: a folder ``wandb``, which it leaves where it ran, would pass for one.
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
