"""Set finished runs side by side: ``python tools/report.py runs/fewshot_tiny/*``.

Few-shot runs get a line per data set; the other protocols a line per method, as papers print them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt.cli import command
from vlprompt.errors import CheckpointError

_KEY = re.compile(r"^(?:(?P<data>.+)/)?shots(?P<shots>\d+)/(?P<zero>zero_shot_)?accuracy$")


def main(arguments: Sequence[str]) -> None:
    """Print accuracies in percent with 95 % intervals; columns are zero-shot, then each run's learner by shots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or metrics.json files")
    parser.add_argument("--format", default="markdown", choices=("markdown", "csv", "latex"))
    args = parser.parse_args(list(arguments))

    from vlprompt.evaluation import tables

    found = [_read(run) for run in args.runs]
    if any(metrics["protocol"] != "coop-fewshot" for metrics in found):
        from vlprompt.evaluation.protocol_tables import protocol_table

        print(getattr(protocol_table(found), args.format)(), end="")
        return
    lines: dict[str, dict[str, Any]] = {}
    for metrics in found:
        _add(lines, metrics)
    rows = [tables.Row(name, values) for name, values in lines.items()]
    columns = list(dict.fromkeys(c for values in lines.values() for c in values))
    columns.sort(key=lambda c: c != "zero-shot")  # stable: only moves zero-shot to the front
    options = {"best": False} if args.format == "markdown" else {}
    print(getattr(tables, f"to_{args.format}")(rows, columns, **options), end="")


def _read(run: Path) -> dict[str, Any]:
    file = run / "metrics.json" if run.is_dir() else run
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a finished run's metrics.json: {error}.") from error


def _add(lines: dict[str, dict[str, Any]], metrics: dict[str, Any]) -> None:
    from vlprompt.evaluation.statistics import Summary

    single = metrics["data"] if isinstance(metrics["data"], str) else "mean"
    for key, value in metrics.items():
        if found := _KEY.match(key):
            column = "zero-shot" if found["zero"] else f"{metrics['learner']} {found['shots']}"
            # Zero-shot doesn't depend on the draw of shots: one number, without an interval.
            ci95 = None if found["zero"] else metrics.get(f"{key}_ci95")
            summary = Summary(value, None, ci95, len(metrics["seeds"]))
            lines.setdefault(found["data"] or single, {})[column] = summary


if __name__ == "__main__":
    command(main)
