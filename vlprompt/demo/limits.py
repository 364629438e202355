"""What the page may read: how many images, how large, and which folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path

__all__ = ["MAX_PIXELS", "MAX_TEXT", "Limits", "check_text_length", "checked_folders"]

MAX_PIXELS = 50_000_000
"""Largest width x height of an uploaded image; its pixels take 150 MB then."""

MAX_TEXT = 20_000
"""Characters of a text that is typed into the page."""


@dataclass(frozen=True)
class Limits:
    """What a page takes.

    Attributes:
        images: How many at once.
        megabytes: The largest file, in 10^6 bytes.
        folders: Those that may be scanned, with all below; resolved.
    """

    images: int = 16
    megabytes: int = 20
    folders: tuple[Path, ...] = ()

    @property
    def upload_bytes(self) -> int:
        """The largest request that uploads files: all images, and what the browser writes around them."""
        return self.images * (self.megabytes * 1_000_000 + 10_000)

    def check_count(self, count: int) -> None:
        """Refuse too many images, and none.

        Raises:
            DataError: Says how many there may be.
        """
        if not count:
            raise DataError("There is no image yet. Drop some on the field for images, or draw examples.")
        if count > self.images:
            raise DataError(
                f"{count} images are too many at once; the limit is {self.images}. "
                "Start the page with a larger one: vlprompt demo --max-images N."
            )

    def folder(self, text: str) -> Path:
        """Return the folder that was typed, if the page may read it.

        Links are resolved first, so that none leads out of what may be read.

        Raises:
            DataError: If it may not be read, is none, or nothing was typed.
        """
        if not self.folders:
            raise DataError(
                "The page may read no folder. Start it with those that it may: vlprompt demo --folder PATH."
            )
        if not text.strip():
            raise DataError(f"Type the folder to scan, in or below {self._listed()}.")
        if "\0" in text:
            raise DataError("A folder's name holds no zero character.")

        path = user_path(text.strip()).resolve()
        if not any(path.is_relative_to(allowed) for allowed in self.folders):
            # The same answer whether it is there or not: the page says nothing about other folders.
            raise DataError(
                f"{printable(text.strip())} lies outside what the page may read: {self._listed()}. "
                "Start it with --folder to add one."
            )
        if not path.is_dir():
            raise DataError(f"There is no folder {printable(str(path))}.")
        return path

    def first_folder(self) -> str:
        """Return the first folder as a person would type it, from where the page was started; empty without one."""
        if not self.folders:
            return ""
        here = Path.cwd()
        first = self.folders[0]
        return str(first.relative_to(here)) if first.is_relative_to(here) else str(first)

    def _listed(self) -> str:
        return ", ".join(printable(str(folder)) for folder in self.folders)


def checked_folders(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the folders of ``--folder``, resolved.

    Raises:
        DataError: If one is no folder.
    """
    for path in paths:
        if not user_path(path).is_dir():
            raise DataError(f"--folder: there is no folder {printable(str(path))}.")
    return tuple(user_path(path).resolve() for path in paths)


def check_text_length(text: str, what: str) -> str:
    """Return a text without blanks around it.

    Args:
        text: As typed.
        what: What an error calls it.

    Raises:
        DataError: If it is longer than :data:`MAX_TEXT`.
    """
    if len(text) > MAX_TEXT:
        raise DataError(
            f"{what}: {len(text):,} characters are too many; at most {MAX_TEXT:,} are taken at once."
        )
    return text.strip()
