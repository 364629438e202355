"""Get data sets ready: ``python tools/prepare.py NAME ...`` fetches, checks and explains; ``--check`` only looks."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlprompt.cli._common import command


def main(arguments: Sequence[str]) -> int:
    """Return 0 if everything that was asked for is ready, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="cards of datasets/; all of them for --check"
    )
    parser.add_argument("--root", type=Path, help="where data sets lie (default: VLPROMPT_DATA or ~/.cache)")
    parser.add_argument("--check", action="store_true", help="fetch nothing; say what is there")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument(
        "--all-offline", action="store_true", help="try every data set that needs no download"
    )
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds without a byte before trying again"
    )
    args = parser.parse_args(list(arguments))

    from vlprompt.data.catalog import default_root

    root = args.root or default_root()
    if args.all_offline:
        return _offline()
    if args.check:
        return _check(args.names, root, args.decode)
    if not args.names:
        parser.error("name a data set, or use --check or --all-offline")
    return max([_prepare(name, root, args.decode, args.timeout) for name in args.names])


def _prepare(name: str, root: Path, decode: bool, timeout: float) -> int:
    from vlprompt.core.errors import DataError
    from vlprompt.data.cards import load_card
    from vlprompt.data.prepare import explain, fetch, status

    card = load_card(name)
    print(explain(card), flush=True)
    try:
        with _progress() as progress:
            fetch(card, root, progress, timeout)
    except DataError as error:
        print(f"{name}: not ready. {error}", file=sys.stderr)
        return 1
    return _report(name, status(card, root, decode))


def _check(names: Sequence[str], root: Path, decode: bool) -> int:
    from vlprompt.data.cards import card_names, load_card
    from vlprompt.data.prepare import status

    results = []
    for name in names or card_names():
        card = load_card(name)
        found = status(card, root, decode)
        if found.state == "absent" and not names:
            fetched = f"{card.download_mb} MB to fetch" if card.archives else "by hand"
            print(f"{name}: absent ({fetched})", flush=True)
        else:
            results.append(_report(name, found))
    return max(results, default=0) if names else 0


def _report(name: str, found: Any) -> int:
    sizes = ", ".join(f"{split} {size}" for split, size in found.sizes.items())
    print(f"{name}: {found.state}{f' ({sizes})' if sizes else ''}", flush=True)
    for problem in found.problems:
        print(f"  {problem}", flush=True)
    return 0 if found.state == "ready" else 1


def _offline() -> int:
    from vlprompt.data import list_datasets, load_dataset
    from vlprompt.data.segmentation import list_segmentation, load_segmentation

    masks = list_segmentation()
    for name in [n for n in list_datasets() if n == "digits" or n.startswith("scenes/")]:
        load = load_segmentation if name in masks else load_dataset
        parts = {split: load(name, split) for split in ("train", "val", "test")}
        for data in parts.values():
            _ = data[0]
        print(f"{name}: ready ({', '.join(f'{s} {len(d)}' for s, d in parts.items())})", flush=True)
    return 0


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, otherwise a line per file and every ten seconds."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        yield show


def _lines() -> Any:
    last: dict[str, float] = {}

    def show(name: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if name not in last or done == total or now - last[name] > 10:
            last[name] = now
            size = f" of {total / 1e6:.0f}" if total else ""
            print(f"{name}: {done / 1e6:.0f}{size} MB", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    command(main)
