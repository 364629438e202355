"""Downloads that resume: one file over HTTP with byte ranges, timeouts, several places, and a checksum at the end.

What has arrived lies beside the target as ``<name>.part``; it survives a kill, and the next call continues it.
"""

from __future__ import annotations

import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.data.checksums import checksum, matches

__all__ = ["Progress", "download"]

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes that have arrived, and how many there will be (None: unknown)."""

_BLOCK = 1 << 20
_AGENT = "vlprompt data sets"
_RETRIES = 4  # in a row without a single new byte


def download(
    urls: Sequence[str],
    target: Path,
    expected: str | None = None,
    *,
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> Path:
    """Fetch one file unless it is there with the right checksum already.

    Args:
        urls: Where it is served; each is tried in turn.
        target: Where it goes.
        expected: Its checksum (see :mod:`vlprompt.data.checksums`); None if none is known.
        timeout: Seconds without a byte after which a connection counts as broken.
        progress: Called for every block.

    Returns:
        ``target``.

    Raises:
        DataError: If no address serves it whole, its checksum is wrong (nothing is kept then), or the disk is full.
    """
    if target.is_file():
        if matches(target, expected):
            return target
        raise DataError(
            f"{target} is there, but is not the file that is expected ({expected}; it has "
            f"{checksum(target, (expected or 'sha256:').partition(':')[0])}). Move it away, then try again."
        )

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")

    reasons = []
    for url in urls:
        try:
            resumed = part.is_file() and part.stat().st_size > 0
            _fetch(url, part, timeout, progress)
            if resumed and not matches(part, expected):
                # The first half may come from another version of the file: fetch all of it again.
                part.unlink()
                _fetch(url, part, timeout, progress)
            _check(part, expected)
            os.replace(part, target)
            return target
        except _BrokenError as error:
            reasons.append(f"{url}: {error}")
        except OSError as error:
            raise DataError(f"{part} can't be written: {error.strerror or error}.") from None

    raise DataError(f"{target.name} could not be fetched. {'; '.join(reasons)}.")


class _BrokenError(Exception):
    """One address does not serve the file; the next one may."""


def _check(part: Path, expected: str | None) -> None:
    if not matches(part, expected):
        actual = checksum(part, str(expected).partition(":")[0])
        part.unlink()
        raise _BrokenError(f"wrong checksum {actual}, expected {expected}; the file was removed")


def _fetch(url: str, part: Path, timeout: float, progress: Progress | None) -> None:
    """Fetch a file into ``part``, continuing what is there, over as many connections as it takes."""
    failures = 0
    while True:
        have = part.stat().st_size if part.is_file() else 0
        try:
            if _one_connection(url, part, have, timeout, progress):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            # 416 means that nothing follows: the file is whole, or another version; the checksum tells which.
            if error.code == 416 and have:
                return
            reason = f"HTTP {error.code} {error.reason}"
            # Client errors do not pass by waiting, except a timeout (408) and too many requests (429).
            if error.code < 500 and error.code not in (408, 429):
                raise _BrokenError(reason) from None
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(error) or type(error).__name__

        # Only attempts without progress count: a slow server may need many connections.
        grown = part.is_file() and part.stat().st_size > have
        failures = 0 if grown else failures + 1
        if failures >= _RETRIES:
            raise _BrokenError(reason)
        time.sleep(min(0.2 * 2**failures, 5.0))


def _one_connection(url: str, part: Path, have: int, timeout: float, progress: Progress | None) -> bool:
    """Receive as much as one connection gives. Returns whether the file is whole."""
    headers = {
        "User-Agent": _AGENT,
        "Accept-Encoding": "identity",
        **({"Range": f"bytes={have}-"} if have else {}),
    }
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        if answer.status != 206:  # the server knows no ranges and sends the file from its start
            have = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise http.client.HTTPException(
                f"asked from byte {have}, got {answer.headers.get('Content-Range')!r}"
            )

        length = answer.headers.get("Content-Length")
        total = have + int(length) if length and length.isdecimal() else None
        _need_space(part, (total or 0) - have)

        with part.open("ab" if have else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(part.name.removesuffix(".part"), have, total)

    return total is None or have >= total


def _need_space(part: Path, more: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if more > free:
        raise DataError(
            f"{part.parent} has {free / 1e9:.1f} GB free, {part.name} needs {more / 1e9:.1f} GB more."
        )
