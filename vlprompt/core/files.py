"""Writing files so that a crash, a kill or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path

__all__ = [
    "path_fingerprint",
    "read_jsonl",
    "read_tensors",
    "write_atomic",
    "write_json",
    "write_jsonl",
    "write_tensors",
    "write_text",
]


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it over ``path``.

    Raises:
        CheckpointError: If the disk is full or the place can't be written; what stood at ``path`` is
            untouched.
    """
    path = user_path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)

        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a rename that survives a power cut must not point at unwritten data
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error.strerror or error}. The old file is kept."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made; the reason is under way already
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    write_atomic(path, lambda temporary: _write_bytes(temporary, text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
        digest.update(f"{name}\x1f{status.st_size}\x1f{status.st_mtime_ns}\n".encode())

    return digest.hexdigest()[:12]


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write tensors and JSON-able metadata into one safetensors file, atomically."""
    flat = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    packed = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    write_atomic(path, lambda temporary: _write_bytes(temporary, tensors_to_bytes(flat, metadata=packed)))


def read_tensors(
    path: Path, prefixes: tuple[str, ...] = ("",)
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote; nothing in the file can run code.

    Args:
        path: The file.
        prefixes: Only tensors whose names start with one of these are read.

    Raises:
        CheckpointError: If the file is missing, truncated or not a safetensors file of ours.
    """
    path = user_path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}.")

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated."
        ) from error

    return tensors, metadata


def _write_bytes(path: Path, data: bytes) -> None:
    # Plain write() rather than a library's own writer: its short writes surface as OSError with the reason.
    with path.open("wb") as file:
        file.write(data)
