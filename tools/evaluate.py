"""The same as ``vlprompt evaluate``: ``python tools/evaluate.py runs/quickstart/ID --data digits``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
