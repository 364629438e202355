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
from vlprompt.data.images import EXTENSIONS, read_image
from vlprompt.security.scan import (
    CLEAN,
    COLUMNS,
    POISONED,
    UNREADABLE,
    Opened,
    Row,
    file_entry,
    scan_rows,
)

__all__ = ["FolderScan", "scan_folder"]

_RUN = 50_000  # names that are sorted in memory at once
_THUMBNAIL = 128  # pixels
_LEAVES = "is a link that leaves the folder"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FolderScan:
    """What a scan found.

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
    detector: Any,
    output: str | Path,
    *,
    threshold: float | None = None,
    resume: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    top: int = 200,
    progress: Progress | None = None,
) -> FolderScan:
    """Scan every image below a folder and write what was found.

    Memory does not grow with the number of images. A scan that was stopped continues behind its last verdict and ends
    with the same files.

    Args:
        folder: Where to look, at any depth; what lies behind links to folders is not.
        detector: See :func:`vlprompt.scan`; one that judges single images.
        output: Where to write; may not lie inside ``folder``.
        threshold: See :func:`vlprompt.scan`.
        resume: Continue; otherwise an older scan in ``output`` is replaced.
        batch_size: Images per pass.
        workers: Threads that decode.
        top: Images on the sheet, most suspicious first.
        progress: Called with ("scanned", done, total).

    Raises:
        DataError: If there is no folder or no image, or the detector judges whole sets only.
        CheckpointError: If the scan to continue is another one, or nothing can be written.
    """
    root, place = Path(folder), Path(output)
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r} to scan.")
    if getattr(detector, "whole", False):
        raise DataError(f"{detector.method} judges whole labelled data sets, not a stream of images.")
    if place.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the output {place} lies inside the scanned folder {root}; name one elsewhere.")
    level = detector.threshold if threshold is None else threshold
    try:
        total = _prepare(root, place, _identity(root, detector, level), resume)
        done = _whole_lines(place / "rows.jsonl")
        preprocess = detector.backbone.preprocess
        entries = (partial(_open, root, name, preprocess) for name in islice(_names(place), done, None))
        with (place / "rows.jsonl").open("a", encoding="utf-8") as file:
            for row in scan_rows(entries, detector, level, batch_size=batch_size, workers=workers):
                file.write(json.dumps(row) + "\n")
                done += 1
                if done % batch_size == 0:
                    file.flush()
                    if progress is not None:
                        progress("scanned", done, total)
        if progress is not None:
            progress("scanned", done, total)
        return _finish(root, place, level, top)
    except OSError as error:
        raise CheckpointError(f"could not write the scan into {place}: {error.strerror or error}.") from error


def _identity(root: Path, detector: Any, threshold: float) -> dict[str, Any]:
    return {
        "folder": str(root.resolve()),
        "method": detector.method,
        "backbone": detector.backbone.fingerprint["id"],
        "triggers": list(detector.triggers),
        "objects": list(detector.classnames),
        "threshold": threshold,
    }


def _prepare(root: Path, place: Path, identity: dict[str, Any], resume: bool) -> int:
    """Make the listing, or check that the one there belongs to this scan; return the number of images."""
    facts = place / "scan.json"
    if resume and facts.is_file():
        try:
            held = json.loads(facts.read_text(encoding="utf-8"))
            total = int(held.pop("total"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{facts} is damaged. Start anew without --resume.") from None
        if held != identity:
            other = next(k for k in identity if held.get(k) != identity[k])
            raise CheckpointError(
                f"{place} holds another scan ({other} differs). Name another output folder."
            )
        return total
    place.mkdir(parents=True, exist_ok=True)
    for name in ("scan.json", "rows.jsonl"):
        (place / name).unlink(missing_ok=True)
    total = 0

    def write(path: Path) -> None:
        nonlocal total
        with path.open("w", encoding="utf-8") as file:
            for name in _sorted_names(root):
                file.write(json.dumps(name) + "\n")
                total += 1

    write_atomic(place / "listing.jsonl", write)
    if not total:
        raise DataError(f"{root} holds no images ({', '.join(EXTENSIONS)}).")
    write_json(facts, {**identity, "total": total})
    return total


def _sorted_names(root: Path) -> Iterator[str]:
    """Yield the sorted relative paths of all images, sorting at most so many in memory and the rest on disk."""
    names = _walk(root)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        runs: list[Iterator[str]] = []
        while run := sorted(islice(names, _RUN)):
            path = Path(scratch, str(len(runs)))
            path.write_text("".join(json.dumps(n) + "\n" for n in run), encoding="utf-8")
            runs.append(map(json.loads, stack.enter_context(path.open(encoding="utf-8"))))
        yield from heapq.merge(*runs)


def _walk(root: Path) -> Iterator[str]:
    folders = [""]
    while folders:
        below = folders.pop()
        try:
            found = os.scandir(root / below)
        except OSError as error:
            warnings.warn(f"{root / below} can't be listed ({error.strerror}): left out.", stacklevel=2)
            continue
        with found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield name


def _names(place: Path) -> Iterator[str]:
    with (place / "listing.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _open(root: Path, name: str, preprocess: Callable[[Image.Image], Any]) -> Opened:
    path = root / name
    if any(ord(c) < 32 for c in name):  # one line per image is what the cleaned list promises
        return Opened(name, None, f"the name {name!r} holds a control character: refused.")
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        return Opened(name, None, f"{name} {_LEAVES}: not followed.")
    return file_entry(path, name, preprocess)


def _whole_lines(path: Path) -> int:
    """Return the number of complete rows, after cutting off one that a kill left half-written."""
    if not path.is_file():
        return 0
    count, end = 0, 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _rows(place: Path) -> Iterator[Row]:
    path = place / "rows.jsonl"
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise CheckpointError(
                    f"{path}, line {number} is damaged. Start anew without --resume."
                ) from None


def _finish(root: Path, place: Path, threshold: float, top: int) -> FolderScan:
    """Write the tables and the sheet from the rows on disk, a row at a time."""
    counts = {CLEAN: 0, POISONED: 0, UNREADABLE: 0}
    worst: list[tuple[float, int, Row]] = []
    for number, row in enumerate(_rows(place)):
        counts[row["verdict"]] += 1
        if row["score"] is not None:
            heapq.heappush(worst, (row["score"], -number, row))
            if len(worst) > top:
                heapq.heappop(worst)
    write_atomic(place / "report.csv", lambda path: _write(path, partial(_csv, place)))
    write_atomic(place / "report.json", lambda path: _write(path, partial(_json, place)))
    write_atomic(place / "cleaned.txt", lambda path: _write(path, partial(_cleaned, place)))
    unreadable = list(islice((r for r in _rows(place) if r["verdict"] == UNREADABLE), 50))
    shown = [row for _, _, row in sorted(worst, key=lambda w: (-w[0], -w[1]))]
    write_text(place / "report.html", _page(root, counts, threshold, shown, unreadable))
    return FolderScan(place, sum(counts.values()), counts[POISONED], counts[UNREADABLE])


def _write(path: Path, fill: Callable[[IO[str]], None]) -> None:
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        fill(file)


def _csv(place: Path, file: IO[str]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(place))


def _json(place: Path, file: IO[str]) -> None:
    start = "[\n"
    for row in _rows(place):
        file.write(start + json.dumps(row))
        start = ",\n"
    file.write("\n]\n" if start != "[\n" else "[]\n")


def _cleaned(place: Path, file: IO[str]) -> None:
    for row in _rows(place):
        if row["verdict"] == CLEAN:
            file.write(f"{row['image']}\n")


def _page(
    root: Path, counts: dict[str, int], threshold: float, rows: list[Row], unreadable: list[Row]
) -> str:
    from jinja2 import Environment, PackageLoader  # a command that fails early needs no templates

    page = Environment(
        loader=PackageLoader("vlprompt.security", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    images = [{**_printable(row), "thumbnail": _thumbnail(root / row["image"])} for row in rows]
    values = {
        "folder": str(root).encode("utf-8", "replace").decode(),
        "counts": counts,
        "threshold": threshold,
        "images": images,
        "unreadable": list(map(_printable, unreadable)),
    }
    return page.get_template("scan.html.j2").render(total=sum(counts.values()), **values)


def _printable(row: Row) -> Row:
    """Return a row whose name can be written as UTF-8; on disk a name may be any bytes."""
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def _thumbnail(path: Path) -> str:
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
