"""Scanning a folder of any size: constant memory, resumable, with a table, a cleaned list and a sheet to look at.

What a scan writes into its output folder, in this order: ``listing.jsonl`` (every image, sorted; fixed when the scan
starts), ``scan.json`` (what is scanned with what), ``rows.jsonl`` (a verdict per image, as they come), and at the end
``report.csv``, ``report.json``, ``cleaned.txt`` and ``report.html``.
"""

from __future__ import annotations

import base64
import heapq
import io
import json
import math
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from PIL import Image

from vlprompt.core.csv_text import csv_line, is_one_line
from vlprompt.core.errors import CheckpointError, DataError, VLPromptError
from vlprompt.core.files import write_atomic, write_json, write_text
from vlprompt.core.options import check_counts
from vlprompt.core.paths import user_path
from vlprompt.data.checksums import checksum
from vlprompt.data.decoding import read_image
from vlprompt.data.images import EXTENSIONS
from vlprompt.data.listing import HIDDEN, NO_IMAGE, Listing, walk
from vlprompt.data.loading import Workers, takes_workers
from vlprompt.learners._scanning import ImageScanner
from vlprompt.security.scan import (
    CLEAN,
    COLUMNS,
    POISONED,
    UNREADABLE,
    Calibration,
    DecodedImage,
    Row,
    decode_file,
    row_stream,
    threshold_of,
)

try:
    import fcntl
except ImportError:  # Windows: two scans into one folder are still told apart at the end, by their rows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderScan", "scan_folder"]

_LISTING = "listing.jsonl"
_FACTS = "scan.json"
_ROWS = "rows.jsonl"
_REPORTS = ("report.csv", "report.json", "cleaned.txt", "report.html")
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
        passed_over: Ending to the number of files that have it and were not looked at: their names are no image's.
    """

    output: Path
    total: int
    poisoned: int
    unreadable: int
    passed_over: dict[str, int]


@takes_workers
def scan_folder(
    folder: str | Path,
    scanner: ImageScanner,
    output: str | Path,
    *,
    threshold: float | None = None,
    calibration: Calibration | None = None,
    resume: bool = False,
    batch_size: int = 64,
    workers: Workers | None = None,
    top: int = 200,
    follow_links: bool = True,
    progress: Progress | None = None,
) -> FolderScan:
    """Scan every image below a folder and write the verdicts.

    Memory does not grow with the number of images. A scan that was stopped continues behind its last verdict and ends
    with the same files.

    Args:
        folder: Where to look, at any depth; listed as :func:`vlprompt.load_dataset` lists it.
        scanner: One that judges single images.
        output: Where to write; may not lie inside ``folder``.
        threshold: See :func:`vlprompt.scan`.
        calibration: What set the threshold instead; it is recorded in ``scan.json`` and on the sheet.
        resume: Continue; otherwise an older scan of the same folder in ``output`` is replaced.
        batch_size: Images per pass.
        workers: Processes that decode; see :data:`vlprompt.data.loading.Workers`.
        top: Images on the sheet, most suspicious first.
        follow_links: Whether links are followed that leave the folder; otherwise an image behind one is unreadable.
        progress: Called with ("scanned", done, total).

    Raises:
        DataError: If there is no folder or no image, the scanner judges whole sets only, or an option is impossible.
        CheckpointError: If the scan to continue is another one or damaged, ``output`` holds a scan of another folder,
            another process writes into it, or nothing can be written.
        NonFiniteError: If a score is not a number.
    """
    root = user_path(folder)
    target = user_path(output)

    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r} to scan.")
    if scanner.needs_whole_set:
        raise DataError(f"{scanner.method} judges whole labelled data sets, not a stream of images.")
    if target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the output {target} lies inside the scanned folder {root}; name one elsewhere.")

    limit = threshold_of(scanner, threshold if calibration is None else calibration.threshold)
    check_counts(batch_size=batch_size)
    if top < 0:
        raise DataError(f"top must not be negative, got {top}.")

    try:
        target.mkdir(parents=True, exist_ok=True)
        with _alone_in(target):
            total = _prepare(root, target, _identity(root, scanner, limit, calibration), resume)
            done = _whole_lines(target / _ROWS)
            decode = partial(_decode, root, preprocess=scanner.preprocess, follow_links=follow_links)
            names = islice(_names(target), done, None)

            with (target / _ROWS).open("a", encoding="utf-8") as file:
                for row in row_stream(decode, names, scanner, limit, batch_size=batch_size):
                    file.write(json.dumps(row) + "\n")
                    done += 1
                    if done % batch_size == 0:
                        file.flush()
                        if progress is not None:
                            progress("scanned", done, total)

            if progress is not None:
                progress("scanned", done, total)
            return _finish(root, target, limit, top, calibration)
    except OSError as error:
        raise CheckpointError(
            f"could not write the scan into {target}: {error.strerror or error}."
        ) from error


def _identity(
    root: Path, scanner: ImageScanner, threshold: float, calibration: Calibration | None
) -> dict[str, Any]:
    """Return what a scan and its continuation must share."""
    identity = {
        "folder": str(root.resolve()),
        "method": scanner.method,
        "backbone": scanner.backbone.features_id,
        "detector": scanner.digest,
        "native_size": scanner.native_size,
        "triggers": list(scanner.triggers),
        "objects": list(scanner.classnames),
        "threshold": threshold,
    }
    return identity if calibration is None else {**identity, "calibration": asdict(calibration)}


def _prepare(root: Path, target: Path, identity: dict[str, Any], resume: bool) -> int:
    """Make the listing, or check that the one there belongs to this scan; return the number of images."""
    if resume and (target / _FACTS).is_file():
        return _continued(target, identity)

    _refuse_other_folder(target, identity)
    for name in (_FACTS, _ROWS, *_REPORTS):  # reports of an older scan must not stand beside rows of this one
        (target / name).unlink(missing_ok=True)
    total = 0
    passed_over: Counter[str] = Counter()

    def write(path: Path) -> None:
        nonlocal total
        with path.open("w", encoding="utf-8") as file:
            for name in _sorted_names(root, passed_over):
                file.write(json.dumps(name) + "\n")
                total += 1

    write_atomic(target / _LISTING, write)
    if not total:
        others = _endings(passed_over)
        raise DataError(
            f"{root} holds no images ({', '.join(EXTENSIONS)}){f', only {others}' if others else ''}."
        )
    facts = {"total": total, "listing": _digest(target), "passed_over": dict(sorted(passed_over.items()))}
    write_json(target / _FACTS, {**identity, **facts})
    return total


@contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    """Refuse to write into a folder that another scan writes into. The lock goes with the process."""
    if fcntl is None:
        yield
        return

    handle = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"another scan writes into {target} at this moment. Wait for it, or name another output folder."
        ) from None
    except OSError:  # a file system without locks
        pass

    try:
        yield
    finally:
        os.close(handle)


def _refuse_other_folder(target: Path, identity: dict[str, Any]) -> None:
    """Refuse to replace the scan of another folder, which may happen to have the same name."""
    try:
        other = json.loads((target / _FACTS).read_text(encoding="utf-8"))["folder"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # none, or one that is damaged
    if other != identity["folder"]:
        raise CheckpointError(
            f"{target} holds the scan of another folder, {other}. Name another output folder, or remove this one."
        )


def _endings(passed_over: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {ending or 'without ending'}" for ending, count in sorted(passed_over.items()))


def _continued(target: Path, identity: dict[str, Any]) -> int:
    """Return the number of images of the scan that is to be continued, after checking that it is this one."""
    facts = _facts(target)
    total = int(facts.pop("total"))
    facts.pop("passed_over")
    if facts.pop("listing") != _digest(target):  # a name that got lost would be an image that nobody looks at
        raise CheckpointError(f"{target / _LISTING} is damaged. Start anew without --resume.")

    if facts != identity:
        different = [key for key in {**identity, **facts} if facts.get(key) != identity.get(key)]
        verb = "differs" if len(different) == 1 else "differ"
        raise CheckpointError(
            f"{target} holds another scan ({', '.join(different)[:200]} {verb}). Name another output folder."
        )

    return total


def _facts(target: Path) -> dict[str, Any]:
    """Return what a scan wrote when it started. Raises CheckpointError if that is damaged."""
    path = target / _FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["total"] = int(facts["total"])
        facts["listing"] = str(facts["listing"])
        facts["passed_over"] = {str(ending): int(count) for ending, count in facts["passed_over"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CheckpointError(f"{path} is damaged. Start anew without --resume.") from None

    return dict(facts)


def _sorted_names(root: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Yield the sorted relative paths of all images; only so many are sorted in memory, the rest on disk.

    Args:
        root: The folder.
        passed_over: Counts the endings of all other files.
    """
    names = _walk(root, passed_over)
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


def _walk(root: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Yield the relative paths of all images, in no order, as every other tool lists them.

    A pipe or a dead link with an image's name is one of them: it gets a row, which says that it can't be read.
    """
    missed = Listing()
    for entry in walk(root, root):
        if isinstance(entry, str):
            yield entry
        elif entry.reason == HIDDEN:
            continue
        elif entry.name.lower().endswith(EXTENSIONS):
            yield entry.name
        elif entry.reason == NO_IMAGE:
            passed_over[Path(entry.name).suffix.lower()] += 1
        else:
            missed.skipped.append(entry)
    missed.warn(root)


def _digest(target: Path) -> str:
    """Return the checksum of the listing; empty if there is none."""
    try:
        return checksum(target / _LISTING, "sha256")
    except FileNotFoundError:
        return ""


def _names(target: Path) -> Iterator[str]:
    with (target / _LISTING).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _decode(
    root: Path, name: str, *, preprocess: Callable[[Image.Image], Any], follow_links: bool
) -> DecodedImage:
    """Decode one image of the folder, unless its name or its link is a danger."""
    path = root / name
    if not is_one_line(name):  # the cleaned list promises one line per image
        return DecodedImage(name, None, f"the name {name!r} holds a control character: refused.")

    try:
        leaves = not follow_links and not path.resolve().is_relative_to(root.resolve())
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # a link that ends nowhere, or in itself
        reason = error.strerror if isinstance(error, OSError) else "it ends in itself"
        what = "a link that can't be followed" if path.is_symlink() else "a file that can't be read"
        return DecodedImage(name, None, f"{name} is {what} ({reason}).")

    if leaves:
        return DecodedImage(name, None, f"{name} is behind a link that leaves the folder: not followed.")
    if not stat.S_ISREG(mode):  # reading a pipe would wait for ever
        return DecodedImage(name, None, f"{name} is no regular file.")
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
    """Yield the verdicts. Raises CheckpointError for a row that is damaged, or of another image than the listing's."""
    path = target / _ROWS
    names = _names(target)
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            row = _row_of(line)
            if row is None or row["image"] != next(names, None):
                raise CheckpointError(f"{path}, line {number} is damaged. Start anew without --resume.")
            yield row

    if next(names, None) is not None:
        raise CheckpointError(f"{path} has fewer rows than there are images. Start anew without --resume.")


def _row_of(line: str) -> Row | None:
    """Return the row that a line holds; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or set(row) != set(COLUMNS):
        return None

    if row["verdict"] == UNREADABLE:
        return row if row["score"] is None else None
    fits = row["verdict"] in (CLEAN, POISONED) and isinstance(row["score"], float)
    return row if fits and math.isfinite(row["score"]) else None


def _finish(
    root: Path, target: Path, threshold: float, top: int, calibration: Calibration | None
) -> FolderScan:
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
    write_text(target / "report.html", _page(root, counts, threshold, suspicious, unreadable, calibration))

    passed_over = _facts(target)["passed_over"]
    return FolderScan(target, sum(counts.values()), counts[POISONED], counts[UNREADABLE], passed_over)


def _write(path: Path, fill: Callable[[IO[str]], None]) -> None:
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        fill(file)


def _csv(target: Path, file: IO[str]) -> None:
    file.write(csv_line(COLUMNS))
    for row in _rows(target):
        file.write(csv_line(row[column] for column in COLUMNS))


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
    root: Path,
    counts: dict[str, int],
    threshold: float,
    rows: list[Row],
    unreadable: list[Row],
    calibration: Calibration | None,
) -> str:
    """Return the sheet as HTML.

    Args:
        root: The scanned folder.
        counts: Verdict to number of images.
        threshold: The score from which an image is suspected.
        rows: The most suspicious images, in order.
        unreadable: The first unreadable ones.
        calibration: What set the threshold; None if it is the scanner's or the user's.
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
        calibration=calibration,
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
