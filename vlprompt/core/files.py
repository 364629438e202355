"""Writing files so that a crash, a kill or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path
from vlprompt.core.temporary import remove_left_behind, temporary_neighbour

__all__ = [
    "is_regular_file",
    "path_fingerprint",
    "read_jsonl",
    "read_tensors",
    "write_atomic",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]

_CHECKSUMS = "checksums"  # key of the metadata of a file of tensors


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it over ``path``.

    A link stays a link: the file that it leads to is replaced. A pipe or a character device (``/dev/stdout``) is
    written to, since a rename would put a file in its place. Temporary files that killed processes left in the folder
    are removed.

    Raises:
        CheckpointError: If the disk is full or the place can't be written, is a folder, a disk, a socket, a link that
            ends in itself or a pipe that nobody reads; what stood at ``path`` is untouched.
    """
    path = user_path(path)
    try:
        target = _target(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise CheckpointError(f"could not write {str(path)!r}: {error}.") from None

    try:
        if target is None:
            _write_through(path, write)
        else:
            _replace(target, write)
    except OSError as error:
        kept = " The old file is kept." if is_regular_file(path) else ""
        raise CheckpointError(f"could not write {path}: {error.strerror or error}.{kept}") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically; names of files that are no UTF-8 are written as the bytes that they are."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a character, which stands for no byte
        data = text.encode("utf-8", "replace")
    write_atomic(path, lambda temporary: _write_bytes(temporary, data))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a name that is no UTF-8: JSON has escapes for it
        text = json.dumps(value, indent=2)
    write_text(path, f"{text}\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one line of JSON per record, atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_jsonl` wrote; an empty list if there is no such file.

    Raises:
        CheckpointError: If it is damaged.
    """
    if not path.is_file():
        return []
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def is_regular_file(path: Path) -> bool:
    """Return whether a path leads to a regular file; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def path_fingerprint(path: Path | str) -> str:
    """Return 12 hex digits that change when a file, or any file below a folder, is renamed, resized or written again.

    Contents are not read, so large files cost nothing. Where there is nothing at the path it returns ``"absent"``.
    """
    root = user_path(path)
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(file for file in root.rglob("*") if file.is_file())
    else:
        return "absent"

    digest = hashlib.sha256()

    for file in files:
        status = file.stat()
        name = "" if file == root else file.relative_to(root).as_posix()
        facts = f"{name}\x1f{status.st_size}\x1f{status.st_mtime_ns}\n"
        digest.update(facts.encode("utf-8", "surrogatepass"))

    return digest.hexdigest()[:12]


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and JSON-able metadata into one safetensors file, atomically, with a checksum of each."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    packed = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    sums = {name: _checksum(tensor) for name, tensor in sorted(flat.items())}
    packed[_CHECKSUMS] = json.dumps([_metadata_checksum(packed), sums])
    write_atomic(path, lambda temporary: _write_bytes(temporary, tensors_to_bytes(flat, metadata=packed)))


def read_tensors(
    path: Path, prefixes: tuple[str, ...] = ("",)
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote; nothing in the file can run code.

    Args:
        path: The file.
        prefixes: Only tensors whose names start with one of these are read.

    Raises:
        CheckpointError: If the file is missing, truncated, not a safetensors file of ours, or a checksum in it differs.
    """
    path = user_path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}.")

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
            raw = dict(file.metadata() or {})
            names = list(file.keys())
            metadata = {key: json.loads(value) for key, value in raw.items()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated."
        ) from error

    if _CHECKSUMS in metadata:  # files of others have none
        damaged = _damage(tensors, names, raw, metadata.pop(_CHECKSUMS))
        if damaged:
            raise CheckpointError(f"{path} does not match its own checksum ({damaged}); it is damaged.")
    return tensors, metadata


def _damage(
    tensors: Mapping[str, torch.Tensor], names: list[str], raw: dict[str, str], checksums: Any
) -> str:
    """Return what of a file differs from its checksums, empty if nothing does."""
    raw.pop(_CHECKSUMS)
    if not isinstance(checksums, list) or len(checksums) != 2 or not isinstance(checksums[1], dict):
        return "the checksums themselves"
    if checksums[0] != _metadata_checksum(raw):
        return "the facts beside the tensors"
    if set(checksums[1]) != set(names):
        return "the names of the tensors"
    return next((name for name, tensor in tensors.items() if checksums[1][name] != _checksum(tensor)), "")


def _metadata_checksum(packed: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(packed.items())).encode()).hexdigest()[:32]


def _checksum(tensor: torch.Tensor) -> str:
    result = hashlib.sha256(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    result.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()[:32]


def _target(path: Path) -> Path | None:
    """Return the regular file, present or not, that is to be replaced; None for what is written to as it stands.

    Raises:
        CheckpointError: If there is something that can be neither.
        OSError: If the path can't be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path)) if path.is_symlink() else path

    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a disk" if stat.S_ISBLK(mode) else "no file"
        raise CheckpointError(f"could not write {path}: it is {kind}. Name a file.")
    if not path.is_symlink():
        return path

    # Links of /proc (``/dev/stdout`` of a command that writes into a file) lead to open files, not to names.
    target = Path(os.path.realpath(path))
    return target if target.exists() and target.samefile(path) else None


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = temporary_neighbour(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(path.parent)
        write(temporary)

        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a rename that survives a power cut must not point at unwritten data
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # where it could not be made; the reason is under way already
            temporary.unlink(missing_ok=True)


def _write_through(path: Path, write: Callable[[Path], None]) -> None:
    """Write the whole content into a pipe or a device; a pipe that nobody reads is an error, not a wait."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "content")
        write(whole)

        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "wb") as file:
            if hasattr(os, "set_blocking"):
                os.set_blocking(handle, True)
            file.write(whole.read_bytes())


def _write_bytes(path: Path, data: bytes) -> None:
    # Plain write() rather than a library's own writer: its short writes surface as OSError with the reason.
    with path.open("wb") as file:
        file.write(data)
