"""Pretrain the embedded `tiny` CLIP: python tools/pretrain.py --cfg pretrain_tiny.yaml [--resume]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlprompt.errors import VLPromptError
from vlprompt.training.pretrain import PretrainOptions, pretrain


def main() -> int:
    """Run the command line; 0 on success, 2 on a user's error."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded tiny CLIP on captioned scenes.")
    parser.add_argument("--cfg", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    parser.add_argument("--output", type=Path, default=None, help="default: runs/<name>")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    arguments = parser.parse_args()
    path = Path(arguments.cfg)
    if not path.is_file():
        path = Path(__file__).parent.parent / "configs" / arguments.cfg
    try:
        options = PretrainOptions.read(path)
        folder = arguments.output or Path("runs") / options.name
        print(pretrain(options, folder, resume=arguments.resume, workers=arguments.workers))
    except VLPromptError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
