"""From the long table to tables for people: rows, columns, an average, paired gains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlprompt.experiments.cell import Coordinate
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, paired_difference, summarise
from vlprompt.experiments.tables import Row, Table

__all__ = ["AVERAGE", "Layout", "complete_means", "gain_tables", "label", "tabulate"]

AVERAGE = "average"


@dataclass(frozen=True)
class Layout:
    """How results are laid out.

    Attributes:
        headline: Key of ``metrics.json`` that is said first.
        metric: What tables show.
        rows: Coordinates that name a row.
        columns: Coordinates that name a column.
        tables: Coordinates whose values make a table each.
        over: The coordinate of independent repetitions: means and intervals are over it, gains are paired by it.
        average: The coordinate that an average column is over; empty for none.
        baselines: Row label to the labels that its paired gains are counted from.
        note: A sentence below each table.
    """

    headline: str
    metric: str = "accuracy"
    rows: tuple[str, ...] = ("method",)
    columns: tuple[str, ...] = ("data",)
    tables: tuple[str, ...] = ()
    over: str = "seed"
    average: str = "data"
    baselines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""


def tabulate(results: Results, layout: Layout) -> list[Table]:
    """Return the tables of a layout: for each group of ``layout.tables`` its values, then its paired gains."""
    tables: list[Table] = []
    measured = results.select(layout.metric)
    for key, group in measured.by(*layout.tables).items():
        title = label(layout.tables, key)
        tables.append(_value_table(group, layout, title))
        tables += gain_tables(group, layout, title)

    return tables


def label(names: Sequence[str], values: Sequence[Coordinate]) -> str:
    """Return coordinates as people read them, for example ``"coop, 16 shots"``."""
    words = []
    for name, value in zip(names, values, strict=True):
        if value is None:
            continue
        if name == "shots":
            words.append(f"{value} shot{'' if value == 1 else 's'}")
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(f"{name} {value}")

    return ", ".join(words)


def complete_means(
    results: Results, over: str, average: str, parts: Collection[Coordinate]
) -> dict[Coordinate, float]:
    """Return the mean over ``parts`` for each repetition that has all of them; a missing part would shift the mean.

    Args:
        results: Lines of one metric, one for each pair of coordinates.
        over: Coordinate of the repetitions, mostly ``"seed"``.
        average: Coordinate that the mean is over, mostly ``"data"``.
        parts: The values of ``average`` that the mean is over, also those whose cells all failed.
    """
    by_part = [results.select(**{average: part}).value_by(over) for part in parts]
    repetitions = results.coordinates(over)
    complete = [key for key in repetitions if all(key in values for values in by_part)]
    return {key: float(np.mean([values[key] for values in by_part])) for key in complete}


def gain_tables(results: Results, layout: Layout, title: str = "") -> list[Table]:
    """Return a table of paired gains for each baseline of the layout."""
    by_row = {label(layout.rows, key): group for key, group in results.by(*layout.rows).items()}
    rows: dict[str, list[Row]] = {}

    for name, baselines in layout.baselines.items():
        for baseline in baselines:
            if name in by_row and baseline in by_row and name != baseline:
                values = _gains(by_row[name], by_row[baseline], layout)
                if values:
                    rows.setdefault(baseline, []).append(Row(name, dict(values)))

    tables = []

    for baseline, lines in rows.items():
        caption = f"Gain over {baseline} in points, paired, with 95 % intervals"
        heading = f"{title}: {caption[0].lower()}{caption[1:]}" if title else caption
        tables.append(Table(lines, title=heading, best=False))

    return tables


def _value_table(results: Results, layout: Layout, title: str) -> Table:
    parts = results.coordinates(layout.average) if layout.average else []
    rows = []

    for key, group in results.by(*layout.rows).items():
        values: dict[str, float | Summary] = {}
        for column, lines in group.by(*layout.columns).items():
            repeated = list(lines.value_by(layout.over).values())
            values[label(layout.columns, column) or layout.metric] = summarise(repeated)

        if len(parts) > 1:
            values |= _averages(group, layout, parts)
        rows.append(Row(label(layout.rows, key), values))

    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    columns.sort(key=lambda column: column.startswith(AVERAGE))  # stable: averages last
    return Table(rows, columns, title, layout.note)


def _averages(group: Results, layout: Layout, parts: Sequence[Coordinate]) -> dict[str, float | Summary]:
    """Return the average column, one for each value of the other columns."""
    others = tuple(name for name in layout.columns if name != layout.average)
    values: dict[str, float | Summary] = {}

    for key, lines in group.by(*others).items():
        means = complete_means(lines, layout.over, layout.average, parts)
        if means:
            name = ", ".join([AVERAGE, *([label(others, key)] if label(others, key) else [])])
            values[name] = summarise(list(means.values()))

    return values


def _gains(ours: Results, theirs: Results, layout: Layout) -> dict[str, Summary]:
    """Return the paired gain of each column, and of their average over repetitions and over data sets."""
    values: dict[str, Summary] = {}
    baseline = theirs.by(*layout.columns)

    for key, lines in ours.by(*layout.columns).items():
        if key in baseline:
            pairs = _pairs(lines.value_by(layout.over), baseline[key].value_by(layout.over))
            if pairs:
                values[label(layout.columns, key) or layout.metric] = _paired(pairs)

    if not layout.average or len(ours.coordinates(layout.average)) < 2:
        return values

    others = tuple(name for name in layout.columns if name != layout.average)
    baseline = theirs.by(*others)

    for key, lines in ours.by(*others).items():
        if key not in baseline:
            continue
        suffix = f", {label(others, key)}" if label(others, key) else ""
        for over, across, what in (
            (layout.over, layout.average, layout.over),
            (layout.average, layout.over, layout.average),
        ):
            parts = lines.coordinates(across)
            mine = complete_means(lines, over, across, parts)
            # A baseline that learns nothing was measured once, so its lines have no seeds to average over.
            theirs_parts = baseline[key].coordinates(across) if across == layout.over else parts
            pairs = _pairs(mine, complete_means(baseline[key], over, across, theirs_parts))
            if pairs:
                values[f"{AVERAGE} over {what}s{suffix}".replace("datas", "data sets")] = _paired(pairs)

    return values


def _pairs(ours: Mapping[Coordinate, float], theirs: Mapping[Coordinate, float]) -> list[tuple[float, float]]:
    """Pair repetitions; a baseline that was measured once stands beside every one of ours."""
    if len(theirs) == 1 and (len(ours) > 1 or None in theirs):
        only = next(iter(theirs.values()))
        return [(value, only) for value in ours.values()]
    return [(value, theirs[key]) for key, value in ours.items() if key in theirs]


def _paired(pairs: Sequence[tuple[float, float]]) -> Summary:
    ours, theirs = zip(*pairs, strict=True)
    return paired_difference(ours, theirs)
