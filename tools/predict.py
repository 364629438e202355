"""The same as ``vlprompt predict``: ``python tools/predict.py runs/quickstart/ID photo.jpg``."""

from __future__ import annotations

import sys

from vlprompt.cli.app import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
