"""The same as ``vlprompt scan``: ``python tools/scan.py FOLDER --detector runs/dbom_tiny/ID``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["scan", *sys.argv[1:]])
