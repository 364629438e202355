"""tar:PATTERN: tar files as webdataset writes them, images and captions side by side under one key."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.archives import Archive, find_archives
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.decoding import decode
from vlprompt.data.images import file_stamp
from vlprompt.data.webdataset import LeftOut, PackedImage, TarSample, TextMember, scan_tar

__all__ = ["TarCaptions"]

_CAPTIONS = (".txt", ".caption", ".json")
_LONGEST_CAPTION = 1 << 20  # bytes; a longer file is no caption
_SEVERAL = "samples have several captions, of which the first is taken"


class _BadCaptionError(ValueError):
    """Why a caption can't be used."""


@dataclass(frozen=True)
class _Pair:
    """An image and its caption."""

    image: PackedImage
    caption: str


@CAPTION_SOURCES.register(
    "tar", summary="webdataset archives: KEY.jpg beside KEY.txt or KEY.json", grammar="tar:PATTERN"
)
class TarCaptions:
    """Archives with ``KEY.jpg`` (or another image) and ``KEY.txt``, ``KEY.caption`` or ``KEY.json`` per pair.

    A key is everything before the last point, so ``a.1.jpg`` belongs to ``a.1.txt``. Headers are read once; images are
    read where they are. Of a list of captions the first is taken. What has no image, no caption or one that can't be
    read is left out; a warning counts it and names the first.

    Args:
        argument: A path, a pattern such as ``shards/*.tar`` or ``shards/{00..12}.tar``, or ``file:`` and a path.
            Archives may be compressed by gzip, bzip2 or xz; such a one is unpacked into a temporary file.

    Raises:
        DataError: If nothing matches, an archive is damaged, or a key has two images or two captions; names them.
    """

    def __init__(self, argument: str) -> None:
        left_out = LeftOut()
        self.pairs: list[_Pair] = []

        for path in find_archives(argument, f"pairs tar:{argument}"):
            archive = Archive.of(path)
            samples = scan_tar(
                archive, lambda path: path.suffix.lower() in _CAPTIONS, _LONGEST_CAPTION, left_out, "captions"
            )
            for sample in samples:
                self._add(sample, left_out)
        left_out.warn(f"tar:{argument}", stacklevel=3)

    def _add(self, sample: TarSample, left_out: LeftOut) -> None:
        """Keep a sample that has both; count one that hasn't."""
        caption, bad = _caption_of(sample, left_out)
        if bad and not caption:
            left_out.add("captions can't be read and are left out", f"{sample.archive.path.name}: {bad}")
        elif sample.image is None:
            left_out.add("captions have no image and are left out", sample.where)
        elif not caption:
            left_out.add("images have no caption and are left out", sample.where)
        else:
            self.pairs.append(_Pair(sample.image, caption))

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.pairs[index].caption

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`."""
        image = self.pairs[index].image
        return decode(image.read(), str(image))

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`."""
        return hash_strings(map(_facts, self.pairs))

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`: the archive's, and the name inside it."""
        image = self.pairs[index].image
        return f"{file_stamp(image.archive.path)}@{image.name}"


def _facts(pair: _Pair) -> str:
    image = pair.image
    return f"{image.archive.path.name}\t{image.name}\t{(image.offset, image.length)}\t{pair.caption}"


def _caption_of(sample: TarSample, left_out: LeftOut) -> tuple[str, str]:
    """Return a sample's caption (a text file's words, else the field ``caption`` of the JSON file), and what is bad.

    Raises:
        DataError: If two text files have different captions.
    """
    captions: dict[str, str] = {}
    bad = ""
    for ending, member in sample.texts.items():
        try:
            captions[ending], several = _read_caption(member, ending)
        except (
            ValueError,
            RecursionError,
        ) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            bad = f"{member.name} ({error or type(error).__name__})"
            continue
        if several:
            left_out.add(_SEVERAL, f"{sample.archive.path.name}: {member.name}")

    words = {ending: captions[ending] for ending in (".txt", ".caption") if captions.get(ending)}
    if len(set(words.values())) > 1:
        last = [member.name for ending, member in sample.texts.items() if ending in words][-1]
        raise DataError(
            f"{sample.archive.path} holds two different captions of {last}: {' and '.join(words)} files."
        )
    return next((captions[ending] for ending in _CAPTIONS if captions.get(ending)), ""), bad


def _read_caption(member: TextMember, ending: str) -> tuple[str, bool]:
    """Return the words of a caption's file, and whether it holds several captions.

    Raises:
        ValueError: If it is no UTF-8, no JSON, or its caption is no text.
    """
    if member.size > _LONGEST_CAPTION:
        raise _BadCaptionError(f"{member.size} bytes are no caption")
    text: Any = member.data.decode("utf-8-sig")
    if ending != ".json":
        return " ".join(text.split()), False

    content = json.loads(text)
    value = content.get("caption") if isinstance(content, dict) else None
    several = isinstance(value, list) and len(value) > 1
    if isinstance(value, list):
        value = next(iter(value), None)
    if value is None:
        return "", False
    if not isinstance(value, str):
        raise _BadCaptionError(f"its caption is a {type(value).__name__}, no text")
    return " ".join(value.split()), several
