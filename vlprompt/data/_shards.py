"""Rows by key in memory-mapped safetensors files: the storage below the feature cache."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.files import write_atomic
from vlprompt.core.temporary import remove_left_behind

__all__ = ["KEY_BYTES", "ShardStore", "StoredRows"]

KEY_BYTES = 16
_FORMAT = "1"
_SHARD_BYTES = 1 << 26  # wide rows make shards of fewer rows
_log = logging.getLogger(__name__)


@dataclass
class ShardStore:
    """The rows of one backbone in one type.

    A shard holds ``keys`` (m, 16) uint8 and ``rows`` (m, d), and a digest of both. It is written under a
    temporary name and renamed, so that a process that dies leaves only whole shards behind; several processes
    may write at once.

    Attributes:
        folder: Where the shards lie; None for memory only.
        fingerprint: What the rows were made with; a shard that says otherwise is not read.
        dtype: Type of the rows.
        rows_per_shard: Rows that are gathered before a shard is written.
    """

    folder: Path | None
    fingerprint: str
    dtype: torch.dtype
    rows_per_shard: int
    _where: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # key -> (table, row)
    _tables: list[torch.Tensor] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)  # file names that were read, written or found damaged
    _new_keys: list[bytes] = field(default_factory=list)
    _new_tables: list[int] = field(default_factory=list)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def refresh(self) -> None:
        """Read the shards that appeared since the last look."""
        if self.folder is None or not self.folder.is_dir():
            return

        remove_left_behind(self.folder)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._seen:
                self._read(path)

    def add(self, keys: Sequence[bytes], rows: torch.Tensor) -> None:
        """Take (m, d) rows; they are on disk after at most ``rows_per_shard`` rows or :meth:`flush`.

        Raises:
            DataError: If d differs from the rows that are known.
        """
        self._index(keys, rows.contiguous())
        if self.folder is not None:
            self._new_keys.extend(keys)
            self._new_tables.append(len(self._tables) - 1)
            if len(self._new_keys) >= min(self.rows_per_shard, max(1, _SHARD_BYTES // self.row_bytes)):
                self.flush()

    def rows(self, keys: Sequence[bytes]) -> torch.Tensor:
        """Return (n, d), one row per key; each must be known."""
        positions_of_keys = [self._where[k] for k in keys]
        by_table: dict[int, list[int]] = {}
        for position, (table, _) in enumerate(positions_of_keys):
            by_table.setdefault(table, []).append(position)

        result = torch.empty(len(keys), self._tables[positions_of_keys[0][0]].shape[1], dtype=self.dtype)
        for table, positions in by_table.items():
            result[positions] = self._tables[table][[positions_of_keys[p][1] for p in positions]]

        return result

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; 0 as long as there is none."""
        return self._tables[0].shape[1] * self.dtype.itemsize if self._tables else 0

    @property
    def size(self) -> int:
        """Bytes of all rows that are known, in memory or as pages of files."""
        return len(self._where) * self.row_bytes

    def flush(self) -> None:
        """Write what was added since the last shard; a disk that can't take it causes a warning only."""
        if self.folder is None or not self._new_keys:
            return

        keys = self._new_keys
        pending = self._new_tables
        self._new_keys = []
        self._new_tables = []
        tensors = {"keys": _pack(keys), "rows": torch.cat([self._tables[t] for t in pending])}
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "digest": _digest(tensors)}
        path = self.folder / f"{metadata['digest'][:32]}.safetensors"

        try:
            write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (CheckpointError, SafetensorError) as error:
            warnings.warn(f"features could not be stored under {self.folder}: {error}", stacklevel=3)
            return

        if self._read(path):
            # From here on these rows are pages of the file, so the copies in memory can go.
            for table in pending:
                self._tables[table] = torch.empty(0, self._tables[table].shape[1])

    def _read(self, path: Path) -> bool:
        """Take a shard's rows, as pages of its file; return whether it was fit for use."""
        self._seen.add(path.name)
        try:
            with safe_open(path, framework="pt") as shard:
                metadata = shard.metadata() or {}
                tensors = {name: shard.get_tensor(name) for name in ("keys", "rows")}
        except (OSError, SafetensorError) as error:
            self._discard(path, str(error))
            return False

        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != self.fingerprint:
            _log.info("%s was made with another backbone or version: not used", path)
            return False

        if metadata.get("digest") != _digest(tensors) or tensors["rows"].dtype != self.dtype:
            self._discard(path, "its digest differs")
            return False

        packed = tensors["keys"].numpy().tobytes()
        self._index([packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)], tensors["rows"])
        return True

    def _discard(self, path: Path, reason: str) -> None:
        warnings.warn(
            f"the feature shard {path} is damaged ({reason}): removed, its rows are computed again.",
            stacklevel=5,
        )
        with contextlib.suppress(OSError):
            path.unlink()

    def _index(self, keys: Sequence[bytes], rows: torch.Tensor) -> None:
        if self._tables and self._tables[0].shape[1] != rows.shape[1]:
            raise DataError(
                f"features of width {rows.shape[1]} under the fingerprint {self.fingerprint!r}, which made "
                f"width {self._tables[0].shape[1]} before: a fingerprint must change when the features do."
            )
        self._tables.append(rows)
        self._where.update({key: (len(self._tables) - 1, i) for i, key in enumerate(keys)})


@dataclass(frozen=True)
class StoredRows:
    """The rows of a data set in its order, read when they are asked for.

    Attributes:
        store: Where they are.
        keys: One per sample.
    """

    store: ShardStore
    keys: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.store.rows([self.keys[i] for i in index.tolist()])

    def all(self) -> torch.Tensor:
        """Return (n, d)."""
        return self.store.rows(self.keys)


def _pack(keys: Sequence[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the sha256 of keys and rows: cheap beside a result that rests on a damaged shard."""
    state = hashlib.sha256()
    for name in ("keys", "rows"):
        tensor = tensors[name].contiguous()
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
