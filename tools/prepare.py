"""The same as ``vlprompt data prepare``: ``python tools/prepare.py NAME ...``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["data", "prepare", *sys.argv[1:]])
