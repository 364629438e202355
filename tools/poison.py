"""The same as ``vlprompt poison``: ``python tools/poison.py --data digits --output poisoned``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["poison", *sys.argv[1:]])
