"""The same as ``vlprompt report``: ``python tools/report.py runs/fewshot_tiny/*``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
