"""Images with captions: where they come from, and the store of their features that meta-training reads.

A kind of source is one file here: a class whose instances give image and caption by number, registered under the
word before the colon in ``kind:ARGUMENT``. No labels are needed.
"""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.registry import Registry

__all__ = ["CAPTION_SOURCES", "CaptionSource", "open_captions"]


class CaptionSource(Protocol):
    """Images with captions, by number, in an order that never changes."""

    def __len__(self) -> int:
        """Return how many captioned images there are."""

    def caption(self, index: int) -> str:
        """Return one caption; quick, no image is touched."""

    def image(self, index: int) -> Image.Image:
        """Return one image as RGB. Raises DataError with its name if it can't be decoded."""

    def identity(self) -> str:
        """Return a string that changes when the captioned images or their order do."""

    def stamp(self, index: int) -> str:
        """Return a string that changes when one image is written again, as readers of data sets do."""


CAPTION_SOURCES: Registry[type[CaptionSource]] = Registry("caption source", "vlprompt.data.captions")
"""Classes whose only argument is what follows the colon."""


def open_captions(name: str) -> CaptionSource:
    """Return the source that ``kind:ARGUMENT`` means, for example ``"scenes:10000"`` or ``"folder:PATH"``.

    Raises:
        UnknownNameError: For an unknown kind; names the nearest.
        DataError: If the argument doesn't fit, or there is no captioned image; says what is expected.
    """
    kind, colon, argument = name.partition(":")
    entry = CAPTION_SOURCES.get(kind)
    if not colon or not argument:
        raise DataError(f"pairs {name!r}: write {entry.extra['grammar']}.")

    source = entry.target(argument)  # type: ignore[call-arg]  # a protocol says nothing of constructors
    if not len(source):
        raise DataError(f"pairs {name!r}: there is no image with a caption.")
    return source
