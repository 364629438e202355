"""The long table of results: one line per cell and metric, with the coordinates as fields."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprompt.core.errors import DataError
from vlprompt.experiments.cell import Cell, CellResult, Coordinate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Line", "Results"]


@dataclass(frozen=True)
class Line:
    """One measured number and where it was measured.

    Attributes:
        where: Coordinates by name.
        metric: What was measured.
        value: A fraction where the metric is one.
    """

    where: Mapping[str, Coordinate]
    metric: str
    value: float

    def record(self) -> dict[str, Any]:
        """Return the line as one flat object."""
        return {**self.where, "metric": self.metric, "value": self.value}


class Results:
    """Measured numbers; every figure, table and statistic of a run is computed from them.

    Args:
        lines: In the order of the experiment's cells.
    """

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self.lines = list(lines)

    @classmethod
    def of(cls, finished: Mapping[Cell, CellResult]) -> Results:
        """Return the table of all finished cells."""
        lines = []
        for cell, result in finished.items():
            for measurement in result.measurements:
                where = {**cell.where, **measurement.where}
                lines.append(Line(where, measurement.metric, measurement.value))
        return cls(lines)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a ``results.jsonl``.

        Raises:
            DataError: If the file is missing or is no such table; names the line.
        """
        lines = []
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} can't be read: {error}.") from error

        for number, text in enumerate(texts, 1):
            try:
                record = json.loads(text)
                metric = str(record.pop("metric"))
                value = float(record.pop("value"))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number} is no line of results: {error}.") from error
            lines.append(Line(record, metric, value))

        return cls(lines)

    def text(self) -> str:
        """Return the table as JSON, one object per line."""
        return "".join(json.dumps(line.record(), ensure_ascii=False) + "\n" for line in self.lines)

    def frame(self) -> pd.DataFrame:
        """Return the table as a data frame: a column per coordinate, then ``metric`` and ``value``."""
        import pandas as pd  # takes a second to import, and a run needs none of it

        frame = pd.DataFrame([line.record() for line in self.lines])
        last = [name for name in ("metric", "value") if name in frame]
        return frame[[*(name for name in frame if name not in last), *last]]

    def __len__(self) -> int:
        return len(self.lines)

    def __add__(self, other: Results) -> Results:
        return Results([*self.lines, *other.lines])

    def select(
        self,
        metric: str | None = None,
        /,
        **where: Coordinate | Collection[Coordinate] | Callable[[Any], bool],
    ) -> Results:
        """Return the lines of a metric at some coordinates.

        Args:
            metric: Name of the metric; None for all.
            **where: A value, several values, or a condition for each coordinate. A line that lacks a coordinate has
                None there.
        """
        conditions = {name: _condition(wanted) for name, wanted in where.items()}
        return Results(
            line
            for line in self.lines
            if metric in (None, line.metric)
            and all(condition(line.where.get(name)) for name, condition in conditions.items())
        )

    def by(self, *names: str) -> dict[tuple[Coordinate, ...], Results]:
        """Return the lines in groups of equal coordinates, in the order in which they first occur."""
        groups: dict[tuple[Coordinate, ...], list[Line]] = {}
        for line in self.lines:
            key = tuple(line.where.get(name) for name in names)
            groups.setdefault(key, []).append(line)
        return {key: Results(lines) for key, lines in groups.items()}

    def coordinates(self, name: str) -> list[Any]:
        """Return the distinct values of a coordinate in the order in which they first occur."""
        return list(dict.fromkeys(line.where.get(name) for line in self.lines))

    def metrics(self) -> list[str]:
        """Return the distinct metrics in the order in which they first occur."""
        return list(dict.fromkeys(line.metric for line in self.lines))

    def values(self) -> list[float]:
        """Return all values."""
        return [line.value for line in self.lines]

    def value_by(self, name: str) -> dict[Any, float]:
        """Return one value for each value of a coordinate.

        Raises:
            DataError: If a value of the coordinate has several lines: they would need a further coordinate.
        """
        by_value: dict[Any, float] = {}
        for line in self.lines:
            key = line.where.get(name)
            if key in by_value:
                raise DataError(
                    f"results are ambiguous: {name}={key!r} has several values of {line.metric!r}."
                )
            by_value[key] = line.value

        return by_value


def _condition(wanted: Any) -> Callable[[Any], bool]:
    if callable(wanted):
        return wanted
    if isinstance(wanted, (list, tuple, set, frozenset)):
        return lambda value: value in wanted
    return lambda value: value == wanted
