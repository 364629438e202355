"""The same as ``vlprompt masks``: ``python tools/masks.py runs/ramt_tiny/ID``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["masks", *sys.argv[1:]])
