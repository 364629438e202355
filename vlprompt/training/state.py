"""Everything a run needs to continue where it stopped, in one file that is replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import read_tensors, write_tensors

__all__ = ["Progress", "load_checkpoint", "save_checkpoint"]

_FILE = "trainer.safetensors"


@dataclass
class Progress:
    """Where a run stands; the next thing to do is step ``step`` of epoch ``epoch``.

    Attributes:
        epoch: Epochs finished.
        step: Optimiser steps finished inside the current epoch.
        sums: Each loss summed over this epoch's finished steps, weighted by samples; and ``"samples"``, their number.
        history: One record per finished epoch.
        best: Best validation score so far, None before the first.
        best_epoch: The epoch it was reached in.
        seconds: Training time so far, over all sessions.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    progress: Progress,
    states: Mapping[str, Mapping[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    scaler: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, replacing the one in ``folder`` atomically.

    Args:
        folder: The run's ``checkpoint`` folder.
        progress: Position and history.
        states: Tensors by kind: ``weights`` (learned), ``best`` (the same at the best epoch), ``running`` (what a
            module accumulates over epochs, for example an average).
        optimizer: Its state is flattened to tensors; no pickle is written.
        identity: What must not change between sessions (options, data, backbone).
        scaler: State of the loss scaler under float16.

    Raises:
        CheckpointError: If it can't be written; the old checkpoint is kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    for kind, state in states.items():
        tensors |= {f"{kind}.{name}": tensor for name, tensor in state.items()}

    optimizer_tensors, optimizer_values = _flatten_optimizer(optimizer)
    metadata = {
        "progress": asdict(progress),
        "identity": dict(identity),
        "optimizer": optimizer_values,
        "scaler": dict(scaler or {}),
    }
    write_tensors(folder / _FILE, tensors | optimizer_tensors, metadata)


def load_checkpoint(
    folder: Path, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> tuple[Progress, dict[str, dict[str, torch.Tensor]], dict[str, Any]] | None:
    """Read the checkpoint of ``folder`` and put the optimiser's state back.

    Args:
        folder: The run's ``checkpoint`` folder.
        optimizer: The new run's; its state is replaced.
        identity: What must be equal, see :func:`save_checkpoint`.

    Returns:
        The progress, the tensors by kind and the scaler's state; None if there is no checkpoint.

    Raises:
        CheckpointError: If it is damaged, or belongs to a run with another identity (each difference is
            named).
    """
    path = folder / _FILE
    if not path.exists():
        return None

    tensors, metadata = read_tensors(path)
    try:
        names = {f.name for f in fields(Progress)}
        progress = Progress(**{k: v for k, v in metadata["progress"].items() if k in names})
        _check_identity(path, metadata["identity"], identity)
        _restore_optimizer(optimizer, tensors, metadata["optimizer"])
    except KeyError as error:
        raise CheckpointError(f"{path} is not a trainer's checkpoint: it lacks {error}.") from error

    states = {kind: _with_prefix(tensors, f"{kind}.") for kind in ("weights", "best", "running")}
    return progress, states, metadata["scaler"]


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_identity(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose run differs; every difference is named."""
    keys = sorted({*saved, *now})
    different = [key for key in keys if _plain(saved.get(key)) != _plain(now.get(key))]

    if different:
        lines = [f"  - {key}: checkpoint {saved.get(key)!r}, now {now.get(key)!r}" for key in different]
        raise CheckpointError(
            f"{path} belongs to another run; it can't be resumed with these settings:\n" + "\n".join(lines)
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back, where tuples become lists."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return an optimiser's tensors and its other values, by parameter's number and name."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}

    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            elif value is not None:
                values[f"{number}.{name}"] = value

    return tensors, values


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what :func:`_flatten_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*_with_prefix(tensors, "optimizer.").items(), *values.items()]:
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value

    # The parameter groups of a run are a function of its options, which the identity has already compared.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
