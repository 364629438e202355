"""Set finished runs side by side: ``python tools/report.py runs/fewshot_tiny/*``.

Few-shot runs get a line per data set; the other protocols a line per method, as papers print them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt.cli._common import command
from vlprompt.core.errors import CheckpointError


def main(arguments: Sequence[str]) -> None:
    """Print accuracies in percent with 95 % intervals; columns are zero-shot, then each run's learner by shots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or metrics.json files")
    parser.add_argument("--format", default="markdown", choices=("markdown", "csv", "latex"))
    args = parser.parse_args(list(arguments))

    from vlprompt.classification.side_by_side import side_by_side

    print(side_by_side([_read(run) for run in args.runs], args.format), end="")


def _read(run: Path) -> dict[str, Any]:
    file = run / "metrics.json" if run.is_dir() else run
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a finished run's metrics.json: {error}.") from error


if __name__ == "__main__":
    command(main)
