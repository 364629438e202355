"""Take the pictures of the documents: ``python docs/screenshots.py``, into docs/images/.

It starts the demo, asks it what the page docs/demo.md tells of, and photographs the answers. Further pictures:

    --scenes                        the README's sheet of embedded scenes
    --report runs/NAME/ID           the README's report
    --site build/site --out FOLDER  pages of the site, wide and narrow, to look at
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from browser import Browser, browser, missing_programs, running_demo

import vlprompt
from vlprompt.core.errors import VLPromptError
from vlprompt.data import scenes
from vlprompt.security.poison import PoisonPlan, poison

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PAGES = ("index", "few-shot", "api/models", "demo")
WIDTHS = (1280, 390)


def main(arguments: Sequence[str]) -> int:
    """Take what was asked for; without options the pictures of the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--report", type=Path, metavar="RUN")
    parser.add_argument("--site", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("build/pictures"))
    args = parser.parse_args(list(arguments))

    if args.scenes:
        scenes.contact_sheet().save(DOCS / "scenes.png", optimize=True)
    if args.report is not None:
        _photograph_report(args.report)
    if args.site is not None:
        _photograph_site(args.site, args.out)
    if not (args.scenes or args.report or args.site):
        _photograph_demo()
    return 0


def _photograph_report(run: Path) -> None:
    with browser(1100, 1500) as page:
        page.open((run / "report.html").resolve().as_uri())
        page.photograph(DOCS / "report.png")


def _photograph_site(site: Path, out: Path) -> None:
    with browser() as page:
        for name in PAGES:
            for width in WIDTHS:
                page.resize(width)
                page.open((site / f"{name}.html").resolve().as_uri())
                picture = out / f"{name.replace('/', '-')}-{width}.png"
                page.photograph(picture)
                print(picture, *page.overflowing(), sep="\n  ")


def _photograph_demo() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _train_scanner(folder / "detector")
        _poison(folder / "downloaded")
        words = ["detector", "--folder", "downloaded"]
        for name in vlprompt.load_dataset("scenes/shape", "test").classnames:
            words += ["--class", name]
        with running_demo(words, folder) as address, browser(1280, 900) as page:
            _show_answers(page, address)


def _train_scanner(folder: Path) -> None:
    """Train the scanner of docs/tutorials/screen.md."""
    backbone = vlprompt.create_backbone("tiny")
    train = vlprompt.load_dataset("triggered:digits", shots=16, seed=1)
    val = vlprompt.load_dataset("triggered:digits", "val", shots=4, seed=1)
    scanner = vlprompt.create_learner("dbom", backbone, train.classnames, train.templates)
    vlprompt.fit(scanner, train, val, epochs=10, batch_size=128, optimizer="adamw", lr=0.003)
    vlprompt.save(scanner, folder)


def _poison(folder: Path) -> None:
    """Write images of digits, a few of which bear a trigger."""
    data = vlprompt.load_dataset("digits", "test").subset(range(60))
    plan = PoisonPlan.parse({"triggers": ["badnets"], "rate": 0.1}, "docs/screenshots.py")
    poison(data, plan, folder)


def _show_answers(page: Browser, address: str) -> None:
    page.open(address)
    page.stop_motion()
    page.find("#examples").click()
    page.wait_for_text("#named", "4 images named")
    page.photograph(IMAGES / "demo-name.png")

    page.resize(390, 844)
    page.photograph(IMAGES / "demo-narrow.png")
    page.resize(1280, 900)

    for name, button, shown, said, picture in (
        ("Adapt", "#adapt", "#adapted", "changes the first name", "demo-adapt.png"),
        ("Find a phrase", "#find", "#found", "searched for", "demo-phrase.png"),
        ("Scan a folder", "#scan", "#scanned", "suspected", "demo-scan.png"),
    ):
        page.choose_tab(name)
        page.find(button).click()
        page.wait_for_text(shown, said)
        page.photograph(IMAGES / picture)


if __name__ == "__main__":
    if missing := missing_programs():
        sys.exit(f"error: {missing}.")
    try:
        sys.exit(main(sys.argv[1:]))
    except VLPromptError as error:
        sys.exit(f"error: {error}")
