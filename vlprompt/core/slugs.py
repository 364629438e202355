"""Texts as names of files: two texts never share one, and none leads out of the folder that it is put into."""

from __future__ import annotations

import hashlib
import re

__all__ = ["folder_word", "slug", "text_of"]

_KEPT = r"\w.@+-"
_DIGITS = 6  # hex digits of a checksum
_CHECKED = re.compile(rf"-[0-9a-f]{{{_DIGITS}}}$")
_SCENES = "scenes"
_LONGEST = 120  # characters of a text; file systems allow 255 bytes, and endings and checksums are added

_SAFE = " -_,'()&+@"  # beside letters and digits, in the folder of a class
_LONGEST_FOLDER = 200  # bytes
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # names that Windows keeps for itself


def slug(text: str) -> str:
    """Return a text as part of a file's name, readable and injective.

    A text of letters, digits and ``_.@+-`` stays as it is, and ``scenes/shape`` becomes ``scenes-shape``. Every other
    text gets a checksum behind it, so that "my dog" and "my_dog" are two names; so does one that looks as if it had
    one. Of ``kind:PATH`` the kind and the end of the path are kept.
    """
    kind, colon, path = text.partition(":")
    if colon and path:
        end = re.sub(r"[^\w.-]+", "-", path.rstrip("/").rpartition("/")[2])[:_LONGEST]
        return f"{slug(kind)}-{end}-{_checksum(path)}"

    name, _, rest = text.partition("/")
    if name == _SCENES and _is_plain(rest):
        return f"{_SCENES}-{rest}"
    if _is_plain(text) and not text.startswith(f"{_SCENES}-"):
        return text

    words = re.sub(rf"[^{_KEPT}]+", "-", text[:_LONGEST]).strip("-.")
    return f"{words}-{_checksum(text)}" if words else _checksum(text)


def folder_word(text: str) -> str:
    """Return the name of the folder of a class: :func:`text_of` gives the class back.

    Letters, digits, blanks and ``-_,'()&+@`` and points inside stay; everything else is written as in web addresses
    (``%2F``). A name that would be longer than 200 bytes is cut and gets a checksum; it can't be read back.
    """
    pieces = []
    for position, character in enumerate(text):
        inside = 0 < position < len(text) - 1
        safe = character.isalnum() or character in _SAFE or (character == "." and inside)
        if character == " " and not inside:
            safe = False
        pieces.append(character if safe else _escaped(character))

    word = "".join(pieces)
    if _DEVICES.fullmatch(word) or word.startswith("__MACOSX"):
        word = _escaped(word[0]) + word[1:]
    if len(word.encode("utf-8", "surrogateescape")) > _LONGEST_FOLDER:
        word = f"{word[: _LONGEST_FOLDER // 4]}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:12]}"
    return word


def text_of(word: str) -> str:
    """Return the text that :func:`folder_word` made a folder's name of; other names stay as they are."""
    try:
        data = re.sub(
            rb"%([0-9A-F]{2})",
            lambda match: bytes([int(match[1], 16)]),
            word.encode("utf-8", "surrogateescape"),
        )
        text = data.decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return word
    return text if folder_word(text) == word else word


def _is_plain(text: str) -> bool:
    """Return whether a text can stand as it is: safe, visible, and without the look of a checksum."""
    safe = re.fullmatch(rf"[{_KEPT}]+", text) is not None and len(text) <= _LONGEST
    ends = text[:1] not in ("", ".", "-") and text[-1:] not in (".", "-")
    return safe and ends and not _CHECKED.search(text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
