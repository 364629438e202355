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

import torch
import yaml

from vlprompt.core.claims import Claims
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_json, write_text
from vlprompt.core.paths import user_path
from vlprompt.core.version import package_version
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.config import ASIDE, ExperimentConfig

__all__ = ["RunFolder", "environment", "yaml_text"]

_DONE = "done.json"
_ALONE = "alone"
_JOINED = "joined"
_RESTART = "restart"
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

    def cell(self, cell: Cell) -> CellFolder:
        """Return the folder of a cell."""
        return CellFolder.of(self.path, cell)

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
    def held(self, *, join: bool = False, restart: bool = False) -> Iterator[None]:
        """Write this run: alone, or beside the others that joined it. A killed process lets go of it by itself.

        Cells have claims of their own (see :class:`vlprompt.experiments.cell_folder.CellFolder`); this one keeps a
        second command from being started by mistake, and a run from being moved aside while others work on it.

        Raises:
            CheckpointError: If another process has what excludes this one; says which.
        """
        claims = Claims(self.parent / f".{self.path.name}.holders")
        keys = {_JOINED} if join else {_ALONE, _RESTART} if restart else {_ALONE}
        against = {_RESTART} if join else {_ALONE, _JOINED, _RESTART} if restart else {_ALONE, _RESTART}

        claim = claims.take(keys, against)
        if claim is None:
            advice = "Wait until it is done, or name another folder with output=FOLDER."
            if not join and not restart:
                advice = f"To work on the same run beside it, add --join. {advice}"
            raise CheckpointError(
                f"{self.path} is being written by {claims.holder(against) or 'another process'}. {advice}"
            )
        with claim:
            yield


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
