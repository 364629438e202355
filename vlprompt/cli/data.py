"""``vlprompt data``: which data sets there are, getting one ready, checking one, converting one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._errors import CommandGroup, on_interrupt
from vlprompt.cli._progress import count_progress, download_progress
from vlprompt.cli.list import print_names
from vlprompt.core.errors import DataError, VLPromptError

if TYPE_CHECKING:
    from vlprompt.data.prepare import Status

__all__ = ["app"]

app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Data sets: list, prepare, check, convert.")
convert = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Turn masks of other formats into binary masks."
)
app.add_typer(convert, name="convert")

Root = Annotated[
    Path | None, typer.Option(help="Where data sets lie.  [default: VLPROMPT_DATA or ~/.cache/vlprompt/data]")
]
Decode = Annotated[bool, typer.Option("--decode", help="Decode every image too.")]


class Split(str, Enum):
    """A part of a data set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@app.command("list")
def list_datasets(
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example 'scenes/*'.")] = "*",
) -> None:
    """Print the names of all data sets, each with a line about it."""
    print_names("datasets", pattern)


@app.command()
def prepare(
    names: Annotated[list[str], typer.Argument(help="Data sets with a card.")],
    root: Root = None,
    decode: Decode = False,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte before trying again.")] = 30.0,
) -> int:
    """Explain a data set, fetch what is missing, and check it.

    Exit status: 0 if all are ready; 1 if not; 2 after a mistake.
    """
    from vlprompt.data.cards import load_card
    from vlprompt.data.names import default_root
    from vlprompt.data.prepare import explain, fetch, status

    cards = [load_card(name) for name in names]  # a wrong name is said before anything is fetched
    folder = root or default_root()
    ready = True

    for card in cards:
        print(explain(card), flush=True)
        try:
            with on_interrupt("The same command continues."), download_progress() as progress:
                fetch(card, folder, progress, timeout)
        except DataError as error:
            print(f"{card.name}: not ready. {error}", file=sys.stderr)
            ready = False
            continue
        ready &= _print_status(card.name, status(card, folder, decode))

    return 0 if ready else 1


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names, or files of yours (PATH, folder:PATH, csv:PATH, tar:PATTERN); without any: all data sets with "
            "a card."
        ),
    ] = None,
    root: Root = None,
    decode: Decode = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Check all data sets that need no download.")
    ] = False,
) -> int:
    """Say what is there of a data set, and compare it with its card. Nothing is fetched.

    Of your own folder or table: its splits and classes with counts, what is left out and why, which images can't be
    read, and which occur in two splits or with two labels.

    Exit status: 0 if all that are named are ready; 1 if not; 2 after a mistake.
    """
    from vlprompt.data import list_datasets as all_datasets
    from vlprompt.data.cards import card_names
    from vlprompt.data.names import default_root
    from vlprompt.data.overview import name_of_path

    place = root or default_root()

    if offline:
        names = [name for name in all_datasets() if name == "digits" or name.startswith("scenes/")]

    if not names:
        _check_all_cards(place, decode)
        return 0

    cards = card_names()
    known = all_datasets()
    ready = []
    for name in names:
        files = name_of_path(name) if name not in known else None
        if files is not None:
            ready.append(_check_files(files))
        elif name in cards:
            ready.append(_check_card(name, place, decode))
        else:
            ready.append(_check_splits(name, place))
    return 0 if all(ready) else 1


def _check_files(name: str) -> bool:
    """Print what a folder or table holds; return whether there is nothing to mend."""
    from vlprompt.core.names import printable
    from vlprompt.data.overview import look_at

    overview = look_at(name)
    count = len(overview.problems)
    verdict = "ready" if not count else "1 problem" if count == 1 else f"{count} problems"
    print(f"{printable(name)}: {verdict}")
    for line in overview.lines:
        print(f"  {printable(line)}")
    for problem in overview.problems:
        print(f"  problem: {printable(problem)}")
    return not count


def _check_all_cards(root: Path, decode: bool) -> None:
    from vlprompt.data.cards import card_names, load_card
    from vlprompt.data.prepare import status

    for name in card_names():
        card = load_card(name)
        state = status(card, root, decode)
        if state.state == "absent":
            source = f"{card.download_mb} MB to fetch" if card.archives else "by hand"
            print(f"{name}: absent ({source})", flush=True)
        else:
            _print_status(name, state)


def _check_card(name: str, root: Path, decode: bool) -> bool:
    from vlprompt.data.cards import load_card
    from vlprompt.data.prepare import status

    card = load_card(name)
    return _print_status(name, status(card, root, decode))


def _check_splits(name: str, root: Path) -> bool:
    """Open every part of a data set without a card, and read one sample of each."""
    from vlprompt.data import load_dataset, load_segmentation
    from vlprompt.data.names import parse_name

    load = load_segmentation if parse_name(name).task == "segmentation" else load_dataset
    sizes = {}
    for split in ("train", "val", "test"):
        data = load(name, split, root=root)
        _ = data[0]
        sizes[split] = len(data)
    print(f"{name}: ready ({_sizes(sizes)})", flush=True)
    return True


def _print_status(name: str, state: Status) -> bool:
    """Print what is known of a data set; return whether it is ready."""
    sizes = f" ({_sizes(state.sizes)})" if state.sizes else ""
    print(f"{name}: {state.state}{sizes}", flush=True)
    for problem in state.problems:
        print(f"  {problem}", flush=True)
    return state.state == "ready"


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{split} {size}" for split, size in sizes.items())


@convert.command("coco")
def convert_coco_file(
    annotations: Annotated[Path, typer.Argument(help="The JSON file of instances.")],
    images: Annotated[Path, typer.Argument(help="Folder of its images.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it is read as per_class:OUT.")],
    split: Annotated[Split, typer.Option(help="The part that is written.")] = Split.TRAIN,
) -> None:
    """Turn a COCO instance file into binary masks, one per image and class."""
    from vlprompt.data.segmentation.convert import convert_coco

    with count_progress() as progress:
        written = convert_coco(
            annotations, images, out, split.value, lambda done, total: progress("images", done, total)
        )
    _print_masks(written, out)


@convert.command("indexed")
def convert_class_numbers(
    masks: Annotated[Path, typer.Argument(help="Folder of masks of class numbers.")],
    images: Annotated[Path, typer.Argument(help="Folder of the images.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it is read as per_class:OUT.")],
    classes: Annotated[
        list[str], typer.Option("--class", metavar="NAME=NUMBER", help="A class and its number; repeat it.")
    ],
    split: Annotated[Split, typer.Option(help="The part that is written.")] = Split.TRAIN,
) -> None:
    """Turn masks of class numbers into binary masks, one per image and class."""
    from vlprompt.data.segmentation.convert import convert_indexed

    numbers = _numbers(classes)
    with count_progress() as progress:
        written = convert_indexed(
            masks, images, numbers, out, split.value, lambda done, total: progress("images", done, total)
        )
    _print_masks(written, out)


def _numbers(classes: Sequence[str]) -> dict[str, int]:
    """Return class name to number.

    Raises:
        VLPromptError: If an entry is not NAME=NUMBER.
    """
    numbers = {}
    for text in classes:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal():
            raise VLPromptError(
                f"--class takes NAME=NUMBER with a whole number, for example cat=3; got {text!r}."
            )
        numbers[name] = int(number)

    return numbers


def _print_masks(written: dict[str, int], out: Path) -> None:
    for name, count in written.items():
        print(f"{name}: {count} masks")
    print(f"read it as per_class:{out}")
