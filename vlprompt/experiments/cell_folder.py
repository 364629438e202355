"""The folder of a cell: who may write it, and what a finished or a failed cell leaves there.

The process that computes a cell owns its folder through a claim (see :mod:`vlprompt.core.claims`, which says why that
is sound on a folder that many machines share), and writes the result itself. So the results of a run are parts, one
file per cell, and no two processes ever add to the same file; whoever reads the run puts the parts together.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.claims import Claims
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_json
from vlprompt.experiments.cell import Cell, CellResult, Failure

__all__ = ["CellFolder"]

_CELL = "cell.json"
_FAILURE = "failure.json"
_TIMINGS = "timings.json"


@dataclass(frozen=True)
class CellFolder:
    """One cell on disk.

    Attributes:
        path: The folder.
        cell: Whose it is.
    """

    path: Path
    cell: Cell

    @classmethod
    def of(cls, run: Path, cell: Cell) -> CellFolder:
        """Return the folder of a cell of a run."""
        return cls(run / "cells" / cell.name, cell)

    @property
    def claims(self) -> Claims:
        """Who works on the cell."""
        return Claims(self.path)

    def result(self) -> CellResult | None:
        """Return what the finished cell left behind, None if it did not finish.

        Raises:
            CheckpointError: If the file is damaged.
        """
        if not (self.path / _CELL).is_file():
            return None

        try:
            record = json.loads((self.path / _CELL).read_text(encoding="utf-8"))
            return CellResult.from_record(record, self.timings())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / _CELL} is damaged ({error}). Delete this file to run the cell again."
            ) from error

    def timings(self) -> dict[str, float]:
        """Return the seconds that the finished cell took, by name; empty if it measured none."""
        path = self.path / _TIMINGS
        if not path.is_file():
            return {}
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def failure(self) -> Failure | None:
        """Return why the last attempt failed, None if it didn't."""
        try:
            record = json.loads((self.path / _FAILURE).read_text(encoding="utf-8"))
            return Failure(str(record["message"]), str(record["stack"]), None, bool(record["mistake"]))
        except (OSError, ValueError, KeyError, TypeError):  # for people; a damaged one says nothing
            return None

    def keep(self, answer: CellResult | Failure) -> None:
        """Write what an attempt came to; of a result ``cell.json`` comes last and says that the cell is finished."""
        if isinstance(answer, Failure):
            facts = {"message": answer.message, "stack": answer.stack, "mistake": answer.mistake}
            write_json(self.path / _FAILURE, {"coordinates": self.cell.where, **facts})
            return

        if answer.timings:
            write_json(self.path / _TIMINGS, answer.timings)
        write_json(self.path / _CELL, {"coordinates": self.cell.where, **answer.record()})
        self.forget_failure()
        self.log.unlink(missing_ok=True)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Write what this process says, also from below Python, into ``log.txt``, which an attempt begins anew."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as file:
            kept = [(number, os.dup(number)) for number in (1, 2)]
            _flush()
            for number, _ in kept:
                os.dup2(file.fileno(), number)
            try:
                yield
            finally:
                _flush()
                for number, copy in kept:
                    os.dup2(copy, number)
                    os.close(copy)

    @property
    def log(self) -> Path:
        """What was said during the last attempt, where nobody sees the process; removed when the cell finishes."""
        return self.path / "log.txt"

    def forget_failure(self) -> None:
        """Remove why an earlier attempt failed."""
        (self.path / _FAILURE).unlink(missing_ok=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
