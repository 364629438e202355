"""A unit of work of an experiment, and what comes out of it."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlprompt.core.errors import VLPromptError
from vlprompt.core.slugs import slug

__all__ = ["Cell", "CellResult", "Coordinate", "Failure", "Measurement", "Outcome", "Taken"]

Coordinate = str | int | float | None
"""A value of a coordinate: a method's label, a data set's name, a number of shots, a seed ..."""

_MADE_UP = 0.5  # no gain over it is divided by zero
_LONGEST_NAME = 150  # characters; file systems allow 255 bytes, and checkpoints add endings


@dataclass(frozen=True)
class Cell:
    """One unit of work, told apart from all others of its experiment by its coordinates.

    Attributes:
        coordinates: (name, value) in the order in which tables sort them.
        needs: Names of the cells that must have finished before this one starts.
    """

    coordinates: tuple[tuple[str, Coordinate], ...]
    needs: tuple[str, ...] = ()

    @classmethod
    def at(cls, needs: Sequence[str] = (), /, **coordinates: Coordinate) -> Cell:
        """Return the cell at the coordinates that are given as keywords; one that is None is left out."""
        present = tuple((name, value) for name, value in coordinates.items() if value is not None)
        return cls(present, tuple(needs))

    @property
    def where(self) -> dict[str, Coordinate]:
        """The coordinates by name."""
        return dict(self.coordinates)

    @property
    def name(self) -> str:
        """A name for logs and for the cell's folder, for example ``"coop_scenes-shape_16shots_seed1"``."""
        words = [_word(key, value) for key, value in self.coordinates]
        name = "_".join(words) or "cell"
        if len(name) <= _LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{name[:_LONGEST_NAME]}-{digest}"

    def __getitem__(self, name: str) -> Any:
        return self.where[name]

    def get(self, name: str, default: Coordinate = None) -> Any:
        """Return a coordinate, or the default where the cell has none of that name."""
        return self.where.get(name, default)

    def sibling(self, **changes: Coordinate) -> Cell:
        """Return the cell that differs in the coordinates that are given; it needs no other."""
        return Cell.at((), **{**self.where, **changes})


@dataclass(frozen=True)
class Measurement:
    """One number that a cell measured.

    Attributes:
        metric: What was measured, for example ``"accuracy"``.
        value: A fraction where the metric is one.
        where: Coordinates beyond those of the cell, for example ``{"part": "base"}``; they take precedence.
    """

    metric: str
    value: float
    where: Mapping[str, Coordinate] = field(default_factory=dict)


@dataclass
class CellResult:
    """What a finished cell leaves behind, beside the files in its folder.

    Attributes:
        measurements: All numbers that do not depend on a clock.
        facts: What the numbers depend on (fingerprints, checksums), as JSON-able data; goes into ``metrics.json``.
        timings: Seconds by name. They are kept apart, so that a run that was killed and continued ends with the very
            files of an uninterrupted one.
    """

    measurements: list[Measurement] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], **where: Coordinate) -> None:
        """Take numbers in.

        Args:
            metrics: Metric to value.
            **where: Coordinates beyond those of the cell.
        """
        for metric, value in metrics.items():
            self.measurements.append(Measurement(metric, float(value), where))

    def sketch(self, metrics: Sequence[str], **where: Coordinate) -> None:
        """Take in metrics of which only the names are known yet, with made-up values (see ``Experiment.sketch``)."""
        self.add(dict.fromkeys(metrics, _MADE_UP), **where)

    def numbers(self) -> dict[str, float]:
        """Return metric to value; coordinates beyond the cell's stand before a metric: ``new/accuracy``."""
        numbers = {}
        for measurement in self.measurements:
            words = [str(value) for value in measurement.where.values() if value is not None]
            numbers["/".join([*words, measurement.metric])] = measurement.value
        return numbers

    def record(self) -> dict[str, Any]:
        """Return everything but the timings as JSON-able data."""
        lines = [{**m.where, "metric": m.metric, "value": m.value} for m in self.measurements]
        return {"measurements": lines, "facts": self.facts}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], timings: Mapping[str, float]) -> CellResult:
        """Return what :meth:`record` described."""
        measurements = []
        for line in record["measurements"]:
            where = {k: v for k, v in line.items() if k not in ("metric", "value")}
            measurements.append(Measurement(line["metric"], line["value"], where))
        return cls(measurements, dict(record["facts"]), dict(timings))


@dataclass(frozen=True)
class Failure:
    """Why a cell did not finish.

    Attributes:
        message: What to tell people.
        stack: The stack, for developers; empty where there is none.
        error: The exception, if it was raised in this process.
        mistake: Whether it is a user's mistake (a :class:`VLPromptError`).
    """

    message: str
    stack: str = ""
    error: Exception | None = None
    mistake: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return the failure that an exception stands for."""
        message = str(error) or type(error).__name__
        stack = "".join(traceback.format_exception(error))
        return cls(message, stack, error, isinstance(error, VLPromptError))

    def without_error(self) -> Failure:
        """Return the same for another process: exceptions do not always survive the way there."""
        return Failure(self.message, self.stack, None, self.mistake)

    def exception(self) -> Exception:
        """Return what to raise for it."""
        if self.error is not None:
            return self.error
        return VLPromptError(self.message)


@dataclass(frozen=True)
class Taken:
    """A cell that another process works on, which will leave its result in the cell's folder.

    Attributes:
        holder: Who that is, for people.
    """

    holder: str


Outcome = CellResult | Failure | Taken
"""What an attempt to run a cell comes to."""


def _word(key: str, value: Coordinate) -> str:
    if key == "shots":
        return f"{value}shots"
    if isinstance(value, str):
        return slug(value)
    return f"{key}{value}"
