"""The same as ``vlprompt segment``: ``python tools/segment.py predict image.jpg "a red circle"``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["segment", *sys.argv[1:]])
