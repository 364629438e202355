"""Set finished runs side by side: ``python tools/report.py runs/fewshot_tiny/* --only shots --format markdown``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt.cli import command
from vlprompt.errors import CheckpointError


def main(arguments: Sequence[str]) -> None:
    """Print one line per run and one for zero-shot, one column per accuracy in their metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or metrics.json files")
    parser.add_argument("--only", default="", help="keep columns whose name holds this text")
    parser.add_argument("--format", default="markdown", choices=("markdown", "csv", "latex"))
    args = parser.parse_args(list(arguments))

    from vlprompt.evaluation import tables

    found = [_read(run) for run in args.runs]
    rows = [tables.Row("zero-shot", _values(found[0], "zero_shot_accuracy", args.only))]
    rows += [tables.Row(metrics["learner"], _values(metrics, "accuracy", args.only)) for metrics in found]
    print(getattr(tables, f"to_{args.format}")(rows))


def _read(run: Path) -> dict[str, Any]:
    file = run / "metrics.json" if run.is_dir() else run
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a finished run's metrics.json: {error}.") from error


def _values(metrics: dict[str, Any], stem: str, only: str) -> dict[str, Any]:
    """Return column name to value: ``digits/shots16/accuracy`` becomes the column ``digits/shots16``."""
    from vlprompt.evaluation.statistics import Summary

    keys = [k for k in metrics if k.split("/")[-1] == stem and not k.startswith(("val/", "train/"))]
    columns = {k: k.removesuffix(stem).rstrip("/") or "mean" for k in keys}
    return {
        column: Summary(metrics[k], None, metrics.get(f"{k}_ci95"), len(metrics["seeds"]))
        for k, column in columns.items()
        if only in column
    }


if __name__ == "__main__":
    command(main)
