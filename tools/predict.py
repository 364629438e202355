"""Name images with a saved learner: ``python tools/predict.py PROMPT_FOLDER photo.jpg more/ --topk 5``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> int:
    """Print one line per image, or CSV; exit 1 if an image could not be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="folder with prompt.safetensors and prompt.json")
    parser.add_argument("images", nargs="+", help="image files or folders")
    parser.add_argument("--topk", type=int, default=5, help="names per image")
    parser.add_argument("--classes", nargs="+", help="other class names to choose from")
    parser.add_argument("--csv", type=Path, help="write the table here instead of printing it")
    args = parser.parse_args(list(arguments))

    import vlprompt
    from vlprompt.core.files import write_text

    learner = vlprompt.load(args.prompt, kind="learner")
    if args.classes:
        learner = learner.with_classes(args.classes)
    tables = [vlprompt.predict(learner, image, args.topk) for image in args.images]
    rows = [row for table in tables for row in table]
    table = type(tables[0])(rows)
    if args.csv:
        write_text(args.csv, table.to_csv())
    else:
        print(table)
    failed = sum(bool(row["error"]) for row in rows)
    if failed:
        print(f"{failed} of {len(rows)} images could not be read.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
