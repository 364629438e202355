"""Score a saved learner on a data set: ``python tools/evaluate.py PROMPT_FOLDER --data scenes/shape@sketch``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> None:
    """Print the metrics as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="folder with prompt.safetensors and prompt.json")
    parser.add_argument("--data", required=True, help="catalogue name, folder:PATH or csv:PATH")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument("--classes", default="all", choices=("all", "base", "new"))
    parser.add_argument("--root", help="where data sets lie")
    args = parser.parse_args(list(arguments))

    import vlprompt

    learner = vlprompt.load(args.prompt, kind="learner")
    data = vlprompt.load_dataset(args.data, args.split, classes=args.classes, root=args.root)
    if learner.classnames != data.classnames:
        learner = learner.with_classes(data.classnames)
    print(json.dumps({"data": data.name, "split": args.split, **vlprompt.evaluate(learner, data)}, indent=2))


if __name__ == "__main__":
    command(main)
