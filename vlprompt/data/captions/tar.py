"""tar:PATTERN: tar files as webdataset writes them, images and captions side by side under one key."""

from __future__ import annotations

import glob
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.images import EXTENSIONS, decode, file_stamp
from vlprompt.data.sources import AbsentError

__all__ = ["TarCaptions"]

_CAPTIONS = (".txt", ".caption")


@dataclass
class _Sample:
    """What one key of an archive holds."""

    archive: Path
    name: str
    place: tuple[int, int] | None = None  # offset and length of the image's bytes
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        """A text file's words; without one, the field ``caption`` of the JSON file."""
        return self.captions.get("text") or self.captions.get("json", "")


@CAPTION_SOURCES.register(
    "tar", summary="webdataset archives: KEY.jpg beside KEY.txt or KEY.json", grammar="tar:PATTERN"
)
class TarCaptions:
    """Archives with ``KEY.jpg`` (or another image) and ``KEY.txt``, ``KEY.caption`` or ``KEY.json`` per pair.

    Headers are read once; images are read where they are. Samples without a caption are left out.

    Args:
        argument: A path, or a pattern such as ``shards/*.tar``. Uncompressed archives only.

    Raises:
        DataError: If nothing matches, or an archive is damaged; names it.
    """

    def __init__(self, argument: str) -> None:
        archives = sorted(glob.glob(str(user_path(argument))))
        if not archives:
            raise AbsentError(f"pairs tar:{argument}: no archive matches.")
        samples = [s for archive in archives for s in _scan(Path(archive))]
        self.samples = [s for s in samples if s.place is not None and s.caption]

    def __len__(self) -> int:
        return len(self.samples)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.samples[index].caption

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`."""
        sample = self.samples[index]
        assert sample.place is not None  # the constructor kept no other
        with sample.archive.open("rb") as file:
            file.seek(sample.place[0])
            return decode(file.read(sample.place[1]), f"{sample.archive.name}@{sample.name}")

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`."""
        return hash_strings(f"{s.archive.name}\t{s.name}\t{s.place}\t{s.caption}" for s in self.samples)

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`: the archive's, and the name inside it."""
        sample = self.samples[index]
        return f"{file_stamp(sample.archive)}@{sample.name}"


def _scan(archive: Path) -> list[_Sample]:
    """Return the samples of an archive, in its order."""
    samples: dict[str, _Sample] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            # Only headers and captions are read; the bytes of an image stay where they are.
            for member in tar:
                if not member.isfile():
                    continue

                path = PurePosixPath(member.name)
                key, dot, ending = path.name.partition(".")  # webdataset: a key ends at the first dot
                sample = samples.setdefault(f"{path.parent}/{key}", _Sample(archive, member.name))
                suffix = f"{dot}{ending.lower()}"
                if suffix in EXTENSIONS:
                    sample.name = member.name
                    sample.place = (member.offset_data, member.size)
                elif suffix in _CAPTIONS or suffix == ".json":
                    data = tar.extractfile(member)
                    kind = "json" if suffix == ".json" else "text"
                    sample.captions[kind] = _caption(b"" if data is None else data.read(), kind)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{archive} is no readable tar file: {error}.") from None

    return list(samples.values())


def _caption(data: bytes, kind: str) -> str:
    text = data.decode("utf-8")
    if kind == "json":
        read = json.loads(text)
        text = str(read.get("caption") or "") if isinstance(read, dict) else ""
    return " ".join(text.split())
