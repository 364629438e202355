"""Who works on what in a folder that several machines share, without a server of locks.

A claim is a small file in the folder that it is about. It says whose it is and what it claims: any set of keys. Nothing
is asked of the file system beyond what NFS gives: a file can be put in place whole by a rename; who creates a file in a
folder and lists the folder afterwards sees every file that was created there before his own; ``open`` asks the server
how old a file is. ``flock`` is not used, since it needs a daemon that many shared folders lack.

**No two take the same.** :meth:`Claims.take` writes its own file first, then lists the folder, and gives up if another
living claim has one of its keys. Of two that want the same key, one created its file later. That one lists after both
files are there, so it sees the other's and gives up. At most one is left, whatever the order of everything else. Both
may give up; they try again after a random time.

**A dead owner's claim is taken over.** Its own machine knows at once whether the process still runs: by number,
beginning of the process and boot of the machine. Others judge by its beat: the owner touches its file every
``BEAT_SECONDS``. Who has watched a file for ``SILENT_SECONDS`` of his own steady clock without seeing a change removes
it. No two clocks are compared. Names of files are never used twice, so that nobody can remove or touch the claim of a
successor by mistake.

**What a late riser can do.** Without fencing in the storage nobody can rule out that an owner was only stopped (a
laptop was closed, a network was away) and goes on after it was thought dead. So no result rests on exclusion: what is
done under a claim is a function of the configuration alone, every file is put in place whole by a rename, and a file of
an unfinished computation is a valid state of that very computation. Two owners cost time, and end with the same bytes.
The late riser learns from :attr:`Claim.lost` that its file is gone, and then publishes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from vlprompt.core.files import write_json
from vlprompt.core.process_marks import ProcessMark

__all__ = ["BEAT_SECONDS", "SILENT_SECONDS", "Claim", "Claims", "Holder"]

BEAT_SECONDS = 10.0
"""Seconds between two signs of life of an owner."""

SILENT_SECONDS = 120.0
"""Seconds without a sign of life after which an owner on another machine is thought dead; above what NFS caches."""

_ALL = frozenset({""})
_NAME = re.compile(r"\.[0-9a-f]{16}\.claim")
_ATTEMPTS = 4
_LONGEST_PAUSE = 0.05  # seconds, before the second attempt; twice as long before each further one

# What this process knows of the claims of others. The content of a claim never changes.
_contents: dict[Path, tuple[Holder, frozenset[str]]] = {}
_last_beats: dict[
    Path, tuple[int, float]
] = {}  # time of the file, and the moment at which it was first seen here


@dataclass(frozen=True)
class Holder:
    """Whose a claim is.

    Attributes:
        mark: The process.
        since: Date and time on its machine, for people.
    """

    mark: ProcessMark
    since: str

    def __str__(self) -> str:
        return f"process {self.mark.process} on {self.mark.host}, since {self.since}"


class Claim:
    """Something that this process owns until it lets go of it; a context manager does so at its end.

    Args:
        path: Its file, which is there already.
        beat: Seconds between two signs of life.
    """

    def __init__(self, path: Path, beat: float = BEAT_SECONDS) -> None:
        self.path = path
        self._beat = beat
        self._released = threading.Event()
        threading.Thread(target=self._show_life, daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another process thought this one dead and took over."""
        return not self._touch()

    def release(self) -> None:
        """Let go."""
        self._released.set()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _show_life(self) -> None:
        while not self._released.wait(self._beat):
            if not self._touch():
                return

    def _touch(self) -> bool:
        """Show that this process lives; return whether the claim is still there. It is, where the server is away."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True


class Claims:
    """The claims in one folder.

    Args:
        folder: Of what is claimed; made by the first claim.
        beat: Seconds between two signs of life.
        silent: Seconds without one after which an owner on another machine is thought dead.
    """

    def __init__(self, folder: Path, *, beat: float = BEAT_SECONDS, silent: float = SILENT_SECONDS) -> None:
        self.folder = folder
        self.beat = beat
        self.silent = silent

    def take(self, keys: Collection[str] = _ALL, against: Collection[str] | None = None) -> Claim | None:
        """Claim something, unless a living process has it.

        Args:
            keys: What is claimed; without any it is the folder as a whole.
            against: Keys that nobody else may have; None: those that are claimed.

        Returns:
            The claim; None if another process has one of the keys, or wants it at this very moment.

        Raises:
            CheckpointError: If the folder can't be written.
        """
        rivals = frozenset(keys if against is None else against)
        content = {
            **ProcessMark.here().record(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "keys": sorted(keys),
        }

        for attempt in range(_ATTEMPTS):
            if (
                self.holder(rivals) is not None
            ):  # saves writing a file; what decides comes after it is written
                return None

            path = self.folder / f".{secrets.token_hex(8)}.claim"
            write_json(path, content)
            if next(self._living(rivals, path), None) is None:
                return Claim(path, self.beat)

            path.unlink(missing_ok=True)
            time.sleep(_LONGEST_PAUSE * 2**attempt * secrets.randbelow(1000) / 1000)
        return None

    def holder(self, keys: Collection[str] = _ALL) -> Holder | None:
        """Return who has one of the keys; None if nobody living does."""
        return next(self._living(frozenset(keys), None), None)

    def _living(self, keys: frozenset[str], own: Path | None) -> Iterator[Holder]:
        """Yield the holders of the keys, but for one file; what the dead left behind is removed."""
        paths = self._files()
        for gone in {path for path in list(_contents) if path.parent == self.folder} - set(paths):
            _contents.pop(gone, None)
            _last_beats.pop(gone, None)

        for path in paths:
            if path == own or (content := _content(path)) is None:
                continue

            holder, claimed = content
            if not claimed & keys:
                continue
            if self._dead(path, holder):
                path.unlink(missing_ok=True)
            else:
                yield holder

    def _files(self) -> list[Path]:
        try:
            with os.scandir(self.folder) as entries:
                return [Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name)]
        except OSError:  # there is no folder yet
            return []

    def _dead(self, path: Path, holder: Holder) -> bool:
        """Return whether the owner of a claim is gone: as its machine knows it, else by its beat."""
        runs = holder.mark.runs()
        if runs is not None:
            return not runs

        try:
            with path.open(
                "rb"
            ) as file:  # opening asks the server; a plain stat may be answered from a cache
                beat = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return False

        now = time.monotonic()
        last, since = _last_beats.setdefault(path, (beat, now))
        if last != beat:
            _last_beats[path] = (beat, now)
            return False
        return now - since > self.silent


def _content(path: Path) -> tuple[Holder, frozenset[str]] | None:
    """Return whose a claim is, and of what; None if it was let go of."""
    known = _contents.get(path)
    if known is not None:
        return known

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        content = (
            Holder(ProcessMark.from_record(record), str(record["since"])),
            frozenset(str(key) for key in record["keys"]),
        )
    except OSError:
        return None
    except (
        ValueError,
        KeyError,
        TypeError,
    ):  # written by nothing of ours: nobody's, and it stands in nobody's way
        return None

    _contents[path] = content
    return content
