"""Shards and the images in them, one after the other, with one image in memory at a time."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlprompt.core.errors import DataError, UnknownNameError, VLPromptError
from vlprompt.core.files import is_regular_file
from vlprompt.core.names import printable
from vlprompt.data.archives import WholeMember, find_archives, open_unpacked
from vlprompt.data.images import EXTENSIONS
from vlprompt.data.unpack import DAMAGED

__all__ = ["KINDS", "ShardImage", "find_shards", "import_pyarrow", "is_sharded", "read_shard"]

KINDS = ("tar", "parquet")
"""What stands before the colon: ``tar:PATTERN`` of webdataset's archives, ``parquet:PATTERN`` of lists."""

_CAPTIONS = (".txt", ".caption")
_LONGEST = 256 << 20  # bytes of an image; a longer member is none
_LONGEST_CAPTION = 1 << 20
_PIECE = 1 << 20  # bytes that are read at once behind the end
_ROWS = 64  # of a list in memory
_NAMES = ("name", "key", "path", "url", "id")  # columns that name an image, the first of them that there is


@dataclass(frozen=True)
class ShardImage:
    """One image of a shard, not decoded yet.

    Attributes:
        name: What results call it: its member of the archive, or its line of the list.
        data: Its bytes; None if it can't be read.
        error: Why it can't be read; empty if it can.
        caption: Its caption; empty if it has none, or none was asked for.
    """

    name: str
    data: bytes | None
    error: str = ""
    caption: str = ""


def is_sharded(name: str) -> bool:
    """Return whether a name means shards."""
    return name.partition(":")[0] in KINDS and ":" in name


def find_shards(name: str) -> dict[str, Path]:
    """Return the shards of a name: what each is called in results, and its file, in order.

    Args:
        name: ``tar:PATTERN`` or ``parquet:PATTERN``; a pattern may have ``*`` and ``{0000..0099}``.

    Raises:
        DataError: If there is none, or two can't be told apart.
        UnknownNameError: For an unknown kind.
    """
    kind, _, pattern = name.partition(":")
    if kind not in KINDS:
        raise UnknownNameError("kind of shards", kind, KINDS)

    shards: dict[str, Path] = {}
    for path in find_archives(pattern, name):
        called = path.name if path.name not in shards else f"{path.parent.name}__{path.name}"
        if called in shards:
            raise DataError(
                f"{name}: {shards[called]} and {path} have the same name, and so would their results. Give each its "
                "own command and output."
            )
        shards[called] = path
    return shards


def read_shard(
    path: Path, kind: str, left_out: Counter[str], *, column: str = "image", captions: bool = False
) -> Iterator[ShardImage]:
    """Yield the images of a shard in its order, whether they can be read or not.

    Args:
        path: Of the shard.
        kind: ``"tar"`` or ``"parquet"``.
        left_out: Counts what is no image, by its ending.
        column: Of a list: bytes, ``{bytes, path}``, or paths beside the list.
        captions: Whether captions are read too: ``KEY.txt`` beside ``KEY.jpg``, the column ``caption`` of a list.

    Raises:
        DataError: If the shard is damaged, or a list has no such column.
    """
    damaged = DAMAGED if kind == "tar" else (import_pyarrow().ArrowException, ValueError)
    try:
        if kind == "tar":
            yield from _read_captioned_tar(path, left_out) if captions else _read_tar(path, left_out)
        else:
            yield from _read_list(path, column, captions)
    except VLPromptError:
        raise
    except (OSError, *damaged) as error:  # in a header, in a member, or in a column
        title = "tar" if kind == "tar" else "Parquet"
        raise DataError(f"{path} is no readable {title} file: {printable(str(error))}.") from None


def import_pyarrow() -> Any:
    """Return pyarrow, which reads and writes Parquet.

    Raises:
        VLPromptError: If it isn't installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet  # an extra of the package
    except ImportError:
        raise VLPromptError("work on shards needs pyarrow: pip install 'vlprompt[ray]'.") from None
    return pyarrow


def _members(path: Path, left_out: Counter[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the files of an archive, read forwards; of a compressed one too, which is never unpacked as a whole."""
    with (
        open_unpacked(path) as file,
        tarfile.open(fileobj=file, mode="r|", tarinfo=WholeMember) as tar,
    ):
        for member in tar:  # headers stay in memory, about a KiB an image, until the archive is done
            if member.isreg() and not member.issparse() and not _is_hidden(member.name):
                yield tar, member

        stream = tar.fileobj
        assert stream is not None
        # No block of zeros was read: tarfile takes the end of the file for one.
        if stream.tell() == tar.offset:
            left_out["archives have no end mark and may be cut short"] += 1
        while rest := stream.read(_PIECE):
            if rest.strip(b"\0"):
                left_out["archives go on behind their end mark, where nothing is read"] += 1
                return


def _is_hidden(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(".") or "__MACOSX" in path.parts


def _read_tar(path: Path, left_out: Counter[str]) -> Iterator[ShardImage]:
    for tar, member in _members(path, left_out):
        ending = PurePosixPath(member.name).suffix.lower()
        if ending in EXTENSIONS:
            yield _image_of(tar, member)
        else:
            left_out[ending] += 1


def _read_captioned_tar(path: Path, left_out: Counter[str]) -> Iterator[ShardImage]:
    """Yield images with captions; as webdataset writes them, the members of a key stand side by side."""
    key = ""
    image: ShardImage | None = None
    caption = ""
    for tar, member in _members(path, left_out):
        name = PurePosixPath(member.name)
        ending = name.suffix.lower()
        if str(name.with_suffix("")) != key:
            yield from _captioned(image, caption, left_out)
            key, image, caption = str(name.with_suffix("")), None, ""

        if ending in EXTENSIONS:
            image = _image_of(tar, member)
        elif ending in _CAPTIONS and member.size <= _LONGEST_CAPTION:
            file = tar.extractfile(member)
            text = b"" if file is None else file.read()
            caption = " ".join(text.decode("utf-8-sig", "replace").split())
        else:
            left_out[ending] += 1
    yield from _captioned(image, caption, left_out)


def _captioned(image: ShardImage | None, caption: str, left_out: Counter[str]) -> Iterator[ShardImage]:
    if image is not None and caption:
        yield ShardImage(image.name, image.data, image.error, caption)
    elif image is not None:
        left_out["images without a caption"] += 1
    elif caption:
        left_out["captions without an image"] += 1


def _image_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> ShardImage:
    name = _printable(member.name)
    if member.size > _LONGEST:
        return ShardImage(name, None, f"{name} has {member.size} bytes; an image has at most {_LONGEST}.")
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return ShardImage(name, file.read())


def _read_list(path: Path, column: str, captions: bool) -> Iterator[ShardImage]:
    arrow = import_pyarrow()
    file = arrow.parquet.ParquetFile(path)
    columns = file.schema_arrow.names
    wanted = [column, *(["caption"] if captions else [])]
    for name in wanted:
        if name not in columns:
            raise DataError(f"{path}: {UnknownNameError('column', name, columns)}")
        if columns.count(name) > 1:
            raise DataError(f"{path} has {columns.count(name)} columns called {name!r}. Rename all but one.")
    named = next((name for name in _NAMES if columns.count(name) == 1 and name != column), None)
    rows = [*wanted, *([named] if named else [])]

    number = 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=rows):
        for row in batch.to_pylist():
            has_name = named is not None and row[named] is not None
            name = str(row[named]) if has_name else f"{path.name}:{number}"
            caption = str(row["caption"] or "") if captions else ""
            yield _listed(path, name, row[column], caption, has_name)
            number += 1


def _listed(path: Path, name: str, value: Any, caption: str, has_name: bool) -> ShardImage:
    """Return the image of a line: its bytes, a struct of bytes and path, or a path beside the list."""
    if isinstance(value, dict):
        name = name if has_name or not value.get("path") else str(value["path"])
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return ShardImage(name, value, caption=caption)
    if not isinstance(value, str):
        return ShardImage(name, None, f"{name}: the list has no image here.", caption)

    place = path.parent / value
    try:
        if not is_regular_file(place) or place.stat().st_size > _LONGEST:
            reason = f"{printable(str(place))} is no file of an image."
            return ShardImage(name if has_name else value, None, reason, caption)
        return ShardImage(name if has_name else value, place.read_bytes(), caption=caption)
    except OSError as error:
        return ShardImage(name, None, f"{place} can't be read: {error.strerror}.", caption)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
