"""The folder of a run: its id, who writes it, which cells are finished, and that nothing finished is ever lost.

A run lives in ``<output>/<name>/<id>/``. The id is a hash of the configuration and of the data it reads, so the same
command finds what an earlier one left behind, and other images or other settings get a folder of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml

from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_json, write_text
from vlprompt.core.paths import user_path
from vlprompt.core.version import package_version
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.config import ASIDE, ExperimentConfig

__all__ = ["RunFolder", "environment", "read_timings", "yaml_text"]

_CELL = "cell.json"
_FAILURE = "failure.json"
_TIMINGS = "timings.json"
_DONE = "done.json"
_RECORDED = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "transformers",
    "numpy",
    "safetensors",
    "accelerate",
)


class RunFolder:
    """One run on disk.

    Args:
        config: Its resolved configuration.
        sources: Name to fingerprint of the files that it reads.
    """

    def __init__(self, config: ExperimentConfig, sources: Mapping[str, str]) -> None:
        self.config = config
        self.sources = dict(sources)
        self.parent = user_path(config.output) / config.name
        self.path = self.parent / self._digest()

    def _digest(self) -> str:
        content = _without_devices(self.config.model_dump(mode="json", exclude={"output", "expect", *ASIDE}))
        text = json.dumps([content, self.sources], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def exists(self) -> bool:
        """Whether an earlier command left anything of this run."""
        return (self.path / "config.yaml").is_file()

    @property
    def finished(self) -> bool:
        """Whether the run is complete: every cell, and all files of the whole."""
        return (self.path / _DONE).is_file()

    def start(self) -> None:
        """Write what the run is, before anything of it runs."""
        text = f"# vlprompt {package_version()}\n{yaml_text(self.config)}"
        write_text(self.path / "config.yaml", text)
        write_json(self.path / "sources.json", self.sources)
        write_json(self.path / "environment.json", _environment_record())

    def finish(self, headline: str) -> None:
        """Say that nothing is left to do; this is the last file that is written."""
        write_json(self.path / _DONE, {"headline": headline})

    def move_aside(self) -> Path | None:
        """Rename the folder to ``<id>.N`` with the first free N; return the new path, None if there was none."""
        if not self.path.exists():
            return None

        number = 1
        while (self.parent / f"{self.path.name}.{number}").exists():
            number += 1

        moved = self.parent / f"{self.path.name}.{number}"
        self.path.rename(moved)
        return moved

    def cell(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.path / "cells" / cell.name

    def result(self, cell: Cell) -> CellResult | None:
        """Return what a finished cell left behind, None if it did not finish.

        Raises:
            CheckpointError: If the file is damaged.
        """
        folder = self.cell(cell)
        if not (folder / _CELL).is_file():
            return None

        try:
            record = json.loads((folder / _CELL).read_text(encoding="utf-8"))
            timings = {}

            if (folder / _TIMINGS).is_file():
                timings = json.loads((folder / _TIMINGS).read_text(encoding="utf-8"))
            return CellResult.from_record(record, timings)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / _CELL} is damaged ({error}). Delete this file to run the cell again."
            ) from error

    def keep(self, cell: Cell, result: CellResult) -> None:
        """Write what a finished cell leaves behind; ``cell.json`` comes last and says that it is finished."""
        folder = self.cell(cell)
        if result.timings:
            write_json(folder / _TIMINGS, result.timings)
        write_json(folder / _CELL, {"coordinates": cell.where, **result.record()})
        (folder / _FAILURE).unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, failure: Failure) -> None:
        """Write why a cell did not finish."""
        record = {"coordinates": cell.where, "message": failure.message, "stack": failure.stack}
        write_json(self.cell(cell) / _FAILURE, record)

    def difference(self) -> str:
        """Say what differs from the runs beside this one, for a command that expected to continue one of them."""
        others = [p.parent for p in sorted(self.parent.glob("*/config.yaml"))]
        if not others:
            return f"there is no run in {self.parent}."
        described = {other: self._differences(other) for other in others}
        nearest = min(others, key=lambda other: len(described[other]))
        return f"the nearest run, {nearest}, differs in {'; '.join(described[nearest][:8])}."

    def _differences(self, other: Path) -> list[str]:
        theirs = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8")) or {}
        theirs = {key: value for key, value in theirs.items() if key not in ASIDE}
        ours = self.config.model_dump(mode="json", exclude=set(ASIDE))
        lines = _compare(_without_devices(theirs), _without_devices(ours))

        if (other / "sources.json").is_file():
            sources = json.loads((other / "sources.json").read_text(encoding="utf-8"))
            changed = [k for k in sorted({*sources, *self.sources}) if sources.get(k) != self.sources.get(k)]
            lines += [f"the files of {name}" for name in changed]

        return lines or ["nothing that its files tell"]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one that writes this run; a killed process lets go of it by itself.

        Raises:
            CheckpointError: If another process is writing it; says which.
        """
        self.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.parent / f".{self.path.name}.lock")

        holder = self.parent / f".{self.path.name}.holder"
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise CheckpointError(f"{self.path} is being written by {_who(holder)}. Wait until it is done, "
                                  "or name another folder with output=FOLDER.") from None  # fmt: skip

        try:
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(holder, {"process": os.getpid(), "host": socket.gethostname(), "since": started})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def read_timings(folder: Path, cell: Cell) -> dict[str, float]:
    """Return the seconds that a finished cell of a run took, by name; empty if it measured none.

    Args:
        folder: The run's.
        cell: One of its cells.
    """
    path = folder / "cells" / cell.name / _TIMINGS
    if not path.is_file():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def environment() -> dict[str, str]:
    """Return the versions that figures depend on."""
    return {"vlprompt": package_version(), "torch": torch.__version__, "python": platform.python_version()}


def yaml_text(config: Any, exclude: frozenset[str] = frozenset()) -> str:
    """Return the resolved configuration as YAML, without some of its keys."""
    content = config.model_dump(mode="json", exclude=set(exclude))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _environment_record() -> dict[str, Any]:
    """Return where the run was started; nothing that results are compared by."""
    versions = {}
    for package in _RECORDED:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)

    return {
        **environment(),
        "packages": versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _who(holder: Path) -> str:
    try:
        record = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {record['process']} on {record['host']}, since {record['since']}"
    except (OSError, ValueError, KeyError):  # it has just started, or just stopped
        return "another process"


def _without_devices(content: Any) -> Any:
    """Return a configuration without what says where it computes: that is no part of what a run is."""
    if isinstance(content, Mapping):
        return {key: _without_devices(value) for key, value in content.items() if key != "device"}
    return [_without_devices(value) for value in content] if isinstance(content, list) else content


def _compare(theirs: Any, ours: Any, key: str = "") -> list[str]:
    """Return a sentence for every value that differs, by its dotted key."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        keys: Sequence[str] = list(dict.fromkeys([*theirs, *ours]))
        lines = []

        for name in keys:
            if not key and name == "output":
                continue
            lines += _compare(theirs.get(name), ours.get(name), f"{key}.{name}" if key else str(name))

        return lines

    return [] if theirs == ours else [f"{key} ({theirs!r} there, {ours!r} here)"]
