"""Finished runs side by side: few-shot runs with a line per data set, other protocols with a line per method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vlprompt.classification.tables import protocol_table
from vlprompt.experiments import tables
from vlprompt.experiments.statistics import Summary

__all__ = ["Format", "side_by_side"]

Format = Literal["markdown", "csv", "latex"]

_KEY = re.compile(r"^(?:(?P<data>.+)/)?shots(?P<shots>\d+)/(?P<zero>zero_shot_)?accuracy$")


def side_by_side(runs: Sequence[Mapping[str, Any]], form: Format = "markdown") -> str:
    """Return a table of runs, accuracies in percent with 95 % intervals.

    Args:
        runs: Contents of their ``metrics.json``.
        form: Of the table.

    Raises:
        DataError: If they are of several protocols, or of one that has no table.
    """
    if any(metrics["protocol"] != "coop-fewshot" for metrics in runs):
        return str(getattr(protocol_table(runs), form)())
    lines: dict[str, dict[str, Any]] = {}
    for metrics in runs:
        _add(lines, metrics)
    rows = [tables.Row(name, values) for name, values in lines.items()]
    columns = list(dict.fromkeys(c for values in lines.values() for c in values))
    columns.sort(key=lambda c: c != "zero-shot")  # stable: only moves zero-shot to the front
    options = {"best": False} if form == "markdown" else {}
    return str(getattr(tables, f"to_{form}")(rows, columns, **options))


def _add(lines: dict[str, dict[str, Any]], metrics: Mapping[str, Any]) -> None:
    single = metrics["data"] if isinstance(metrics["data"], str) else "mean"
    for key, value in metrics.items():
        if found := _KEY.match(key):
            column = "zero-shot" if found["zero"] else f"{metrics['learner']} {found['shots']}"
            # Zero-shot doesn't depend on the draw of shots: one number, without an interval.
            ci95 = None if found["zero"] else metrics.get(f"{key}_ci95")
            lines.setdefault(found["data"] or single, {})[column] = Summary(
                value, None, ci95, len(metrics["seeds"])
            )
