"""Make the README's images: ``python docs/figures.py [--report runs/NAME/ID/report.html]``, into docs/."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlprompt.cli._common import command

from vlprompt.core.errors import VLPromptError

DOCS = Path(__file__).parent


def main(arguments: Sequence[str]) -> None:
    """Draw the sheet of scenes; photograph a report if one is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="a run's report.html (needs Chromium to photograph it)")
    args = parser.parse_args(list(arguments))

    from vlprompt.data import scenes

    DOCS.mkdir(exist_ok=True)
    scenes.contact_sheet().save(DOCS / "scenes.png", optimize=True)
    print(DOCS / "scenes.png")
    if args.report is not None:
        _photograph(args.report.resolve(), DOCS / "report.png")
        print(DOCS / "report.png")


def _photograph(page: Path, image: Path, width: int = 1100, height: int = 1500) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        raise VLPromptError("photographing a report needs Chromium (on Debian: apt-get install chromium).")
    with tempfile.TemporaryDirectory() as profile:
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        )
        quiet = (
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        )
        size, out = f"--window-size={width},{height}", f"--screenshot={image}"
        subprocess.run([browser, *options, *quiet, size, out, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    command(main)
