"""Pretrain an embedded model: ``python tools/pretrain.py --cfg pretrain_tiny.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._errors import exit_status


def main(arguments: Sequence[str]) -> None:
    """Run a recipe and print where the packed weights lie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", required=True, help="a name in configs/ or a path")
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--output", type=Path, help="folder of the run; default: runs/<name>")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare data")
    args = parser.parse_intermixed_args(list(arguments))

    from pretraining import read_recipe

    recipe, options = read_recipe(args.cfg, args.overrides)
    folder = args.output or Path("runs") / options.name
    path = recipe.target(options, folder, resume=args.resume, workers=args.workers)
    print(f"{path}: to ship these weights, copy the file to {recipe.extra['ships']}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
