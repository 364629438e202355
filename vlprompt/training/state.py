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
        stopped: Whether a callback has ended the run.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    stopped: bool = False


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
    for key in ("progress", "identity", "optimizer", "scaler"):
        if not isinstance(metadata.get(key), dict):
            raise CheckpointError(f"{path} is not a trainer's checkpoint: it lacks {key!r}.")
    progress = _progress(path, metadata["progress"])
    _check_identity(path, metadata["identity"], identity)

    try:
        _restore_optimizer(optimizer, tensors, metadata["optimizer"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the optimiser's state does not fit ({error}). It is damaged."
        ) from error

    states = {kind: _with_prefix(tensors, f"{kind}.") for kind in ("weights", "best", "running")}
    return progress, states, metadata["scaler"]


def _progress(path: Path, raw: Mapping[str, Any]) -> Progress:
    """Return where a run stands. Raises CheckpointError if no run can stand there."""
    names = {f.name for f in fields(Progress)}
    missing = sorted(names - raw.keys())
    if missing:
        raise CheckpointError(f"{path} is not a trainer's checkpoint: it lacks {missing[0]!r}.")

    progress = Progress(**{name: raw[name] for name in names})
    for name, right in _sound(progress).items():
        if not right:
            raise CheckpointError(f"{path} is damaged: {name} is {str(getattr(progress, name))[:80]}.")
    return progress


def _sound(progress: Progress) -> dict[str, bool]:
    """Return for every field whether its value is possible."""
    history = progress.history
    records = isinstance(history, list) and all(isinstance(record, dict) for record in history)
    # Lengths first: a list as long as a damaged number says might not fit into memory.
    in_order = records and len(history) == progress.epoch
    in_order = in_order and all(record.get("epoch") == number for number, record in enumerate(history))
    return {
        "epoch": _is_count(progress.epoch),
        "step": _is_count(progress.step),
        "sums": isinstance(progress.sums, dict) and all(map(_is_number, progress.sums.values())),
        "history": in_order,
        "best": progress.best is None or _is_number(progress.best),
        "best_epoch": _is_best_epoch(progress),
        "seconds": _is_number(progress.seconds) and progress.seconds >= 0,
        "stopped": isinstance(progress.stopped, bool),
    }


def _is_best_epoch(progress: Progress) -> bool:
    """Return whether the best epoch is one that is over; without a best figure there is none."""
    best: Any = progress.best_epoch
    if progress.best is None:
        return best is None
    return _is_count(best) and _is_count(progress.epoch) and best < progress.epoch


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for position, entry in state.items():
        shape = parameters[position].shape if 0 <= position < len(parameters) else None
        for name, value in entry.items():
            if shape is None or (isinstance(value, torch.Tensor) and value.shape not in (shape, ())):
                raise ValueError(f"{position}.{name} belongs to no parameter")

    # The parameter groups of a run are a function of its options, which the identity has already compared.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
