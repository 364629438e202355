"""The same as ``vlprompt run``: ``python tools/train.py --cfg quickstart.yaml [key=value ...]``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
