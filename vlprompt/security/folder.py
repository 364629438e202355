"""Scanning a folder of any size: constant memory, resumable, with a table, a cleaned list and a sheet to look at.

What a scan writes into its output folder, in this order: ``listing.jsonl`` (every image, sorted; fixed when the scan
starts), ``scan.json`` (what is scanned with what), ``rows.jsonl`` (a verdict per image, as they come), and at the end
``report.csv``, ``report.json``, ``cleaned.txt`` and ``report.html``.
"""

from __future__ import annotations

import base64
import csv
import heapq
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vlprompt.core.errors import CheckpointError, DataError, VLPromptError
from vlprompt.core.files import write_atomic, write_json, write_text
from vlprompt.core.paths import user_path
from vlprompt.data.images import EXTENSIONS, read_image
from vlprompt.learners._scanning import ImageScanner
from vlprompt.security.scan import (
    CLEAN,
    COLUMNS,
    POISONED,
    UNREADABLE,
    DecodedImage,
    Row,
    decode_file,
    row_stream,
)

__all__ = ["FolderScan", "scan_folder"]

_LISTING = "listing.jsonl"
_FACTS = "scan.json"
_ROWS = "rows.jsonl"
_SORTED_AT_ONCE = 50_000  # names in memory
_THUMBNAIL = 128  # pixels
_UNREADABLE_ON_SHEET = 50
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FolderScan:
    """What a scan of a folder came to.

    Attributes:
        output: The folder with the files.
        total: Images looked at.
        poisoned: How many are suspected.
        unreadable: How many could not be read.
    """

    output: Path
    total: int
    poisoned: int
    unreadable: int


def scan_folder(
    folder: str | Path,
    scanner: ImageScanner,
    output: str | Path,
    *,
    threshold: float | None = None,
    resume: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    top: int = 200,
    progress: Progress | None = None,
) -> FolderScan:
    """Scan every image below a folder and write the verdicts.

    Memory does not grow with the number of images. A scan that was stopped continues behind its last verdict and ends
    with the same files.

    Args:
        folder: Where to look, at any depth; what lies behind links to folders is left out.
        scanner: One that judges single images.
        output: Where to write; may not lie inside ``folder``.
        threshold: See :func:`vlprompt.scan`.
        resume: Continue; otherwise an older scan in ``output`` is replaced.
        batch_size: Images per pass.
        workers: Threads that decode.
        top: Images on the sheet, most suspicious first.
        progress: Called with ("scanned", done, total).

    Raises:
        DataError: If there is no folder or no image, or the scanner judges whole sets only.
        CheckpointError: If the scan to continue is another one, or nothing can be written.
    """
    root = user_path(folder)
    target = user_path(output)

    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r} to scan.")
    if scanner.needs_whole_set:
        raise DataError(f"{scanner.method} judges whole labelled data sets, not a stream of images.")
    if target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the output {target} lies inside the scanned folder {root}; name one elsewhere.")

    limit = scanner.threshold if threshold is None else threshold
    try:
        total = _prepare(root, target, _identity(root, scanner, limit), resume)
        done = _whole_lines(target / _ROWS)
        preprocess = scanner.backbone.preprocess
        names = islice(_names(target), done, None)
        entries = (partial(_decode, root, name, preprocess) for name in names)

        with (target / _ROWS).open("a", encoding="utf-8") as file:
            for row in row_stream(entries, scanner, limit, batch_size=batch_size, workers=workers):
                file.write(json.dumps(row) + "\n")
                done += 1
                if done % batch_size == 0:
                    file.flush()
                    if progress is not None:
                        progress("scanned", done, total)

        if progress is not None:
            progress("scanned", done, total)
        return _finish(root, target, limit, top)
    except OSError as error:
        raise CheckpointError(
            f"could not write the scan into {target}: {error.strerror or error}."
        ) from error


def _identity(root: Path, scanner: ImageScanner, threshold: float) -> dict[str, Any]:
    """Return what a scan and its continuation must share."""
    return {
        "folder": str(root.resolve()),
        "method": scanner.method,
        "backbone": scanner.backbone.fingerprint["id"],
        "triggers": list(scanner.triggers),
        "objects": list(scanner.classnames),
        "threshold": threshold,
    }


def _prepare(root: Path, target: Path, identity: dict[str, Any], resume: bool) -> int:
    """Make the listing, or check that the one there belongs to this scan; return the number of images."""
    if resume and (target / _FACTS).is_file():
        return _continued(target, identity)

    target.mkdir(parents=True, exist_ok=True)
    for name in (_FACTS, _ROWS):
        (target / name).unlink(missing_ok=True)
    total = 0

    def write(path: Path) -> None:
        nonlocal total
        with path.open("w", encoding="utf-8") as file:
            for name in _sorted_names(root):
                file.write(json.dumps(name) + "\n")
                total += 1

    write_atomic(target / _LISTING, write)
    if not total:
        raise DataError(f"{root} holds no images ({', '.join(EXTENSIONS)}).")
    write_json(target / _FACTS, {**identity, "total": total})
    return total


def _continued(target: Path, identity: dict[str, Any]) -> int:
    """Return the number of images of the scan that is to be continued, after checking that it is this one."""
    path = target / _FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        total = int(facts.pop("total"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged. Start anew without --resume.") from None

    if facts != identity:
        other = next(key for key in identity if facts.get(key) != identity[key])
        raise CheckpointError(f"{target} holds another scan ({other} differs). Name another output folder.")

    return total


def _sorted_names(root: Path) -> Iterator[str]:
    """Yield the sorted relative paths of all images; only so many are sorted in memory, the rest on disk."""
    names = _walk(root)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        runs: list[Iterator[str]] = []
        while True:
            run = sorted(islice(names, _SORTED_AT_ONCE))
            if not run:
                break
            path = Path(scratch, str(len(runs)))
            path.write_text("".join(json.dumps(name) + "\n" for name in run), encoding="utf-8")
            runs.append(map(json.loads, stack.enter_context(path.open(encoding="utf-8"))))
        yield from heapq.merge(*runs)


def _walk(root: Path) -> Iterator[str]:
    """Yield the relative paths of all images, in no order; hidden files and links to folders are left out."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(root / folder)
        except OSError as error:
            warnings.warn(f"{root / folder} can't be listed ({error.strerror}): left out.", stacklevel=2)
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield name


def _names(target: Path) -> Iterator[str]:
    with (target / _LISTING).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _decode(root: Path, name: str, preprocess: Callable[[Image.Image], Any]) -> DecodedImage:
    """Decode one image of the folder, unless its name or its link is a danger."""
    path = root / name
    if any(ord(character) < 32 for character in name):  # the cleaned list promises one line per image
        return DecodedImage(name, None, f"the name {name!r} holds a control character: refused.")
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        return DecodedImage(name, None, f"{name} is a link that leaves the folder: not followed.")
    return decode_file(path, name, preprocess)


def _whole_lines(path: Path) -> int:
    """Return the number of complete rows, after cutting off one that a kill left half-written."""
    if not path.is_file():
        return 0

    count = 0
    end = 0  # of the last complete line, in bytes

    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count += 1
            end += len(line)
        file.truncate(end)

    return count


def _rows(target: Path) -> Iterator[Row]:
    path = target / _ROWS
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise CheckpointError(
                    f"{path}, line {number} is damaged. Start anew without --resume."
                ) from None


def _finish(root: Path, target: Path, threshold: float, top: int) -> FolderScan:
    """Write the tables and the sheet from the rows on disk, a row at a time."""
    counts = {CLEAN: 0, POISONED: 0, UNREADABLE: 0}
    worst: list[tuple[float, int, Row]] = []  # a heap; of equal scores the earlier image stays
    unreadable: list[Row] = []

    for number, row in enumerate(_rows(target)):
        counts[row["verdict"]] += 1
        if row["verdict"] == UNREADABLE and len(unreadable) < _UNREADABLE_ON_SHEET:
            unreadable.append(row)
        if row["score"] is not None:
            heapq.heappush(worst, (row["score"], -number, row))
            if len(worst) > top:
                heapq.heappop(worst)

    write_atomic(target / "report.csv", lambda path: _write(path, partial(_csv, target)))
    write_atomic(target / "report.json", lambda path: _write(path, partial(_json, target)))
    write_atomic(target / "cleaned.txt", lambda path: _write(path, partial(_cleaned, target)))
    worst.sort(key=lambda entry: (-entry[0], -entry[1]))
    suspicious = [row for _, _, row in worst]
    write_text(target / "report.html", _page(root, counts, threshold, suspicious, unreadable))

    return FolderScan(target, sum(counts.values()), counts[POISONED], counts[UNREADABLE])


def _write(path: Path, fill: Callable[[IO[str]], None]) -> None:
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        fill(file)


def _csv(target: Path, file: IO[str]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(target))


def _json(target: Path, file: IO[str]) -> None:
    start = "[\n"
    for row in _rows(target):
        file.write(start + json.dumps(row))
        start = ",\n"
    file.write("\n]\n" if start != "[\n" else "[]\n")


def _cleaned(target: Path, file: IO[str]) -> None:
    for row in _rows(target):
        if row["verdict"] == CLEAN:
            file.write(f"{row['image']}\n")


def _page(
    root: Path, counts: dict[str, int], threshold: float, rows: list[Row], unreadable: list[Row]
) -> str:
    """Return the sheet as HTML.

    Args:
        root: The scanned folder.
        counts: Verdict to number of images.
        threshold: The score from which an image is suspected.
        rows: The most suspicious images, in order.
        unreadable: The first unreadable ones.
    """
    from jinja2 import Environment, PackageLoader  # a command that fails early needs no templates

    page = Environment(
        loader=PackageLoader("vlprompt.security", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    images = []

    for row in rows:
        images.append({**_printable(row), "thumbnail": _thumbnail(root / row["image"])})
    return page.get_template("scan.html.j2").render(
        folder=str(root).encode("utf-8", "replace").decode(),
        total=sum(counts.values()),
        counts=counts,
        threshold=threshold,
        images=images,
        unreadable=[_printable(row) for row in unreadable],
    )


def _printable(row: Row) -> Row:
    """Return a row whose name can be written as UTF-8; on disk a name may be any bytes."""
    printable = {}
    for key, value in row.items():
        printable[key] = value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    return printable


def _thumbnail(path: Path) -> str:
    """Return a small copy of an image as a data URI, empty if it can't be read any more."""
    try:
        image = read_image(path)
    except VLPromptError:  # an image that went missing since must not cost the sheet
        return ""

    zoom = max(1, _THUMBNAIL // max(image.size))
    if zoom > 1:
        image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)

    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "PNG")

    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
