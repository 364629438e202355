"""Protocols of several stages: source tasks then target tasks, each beside scratch, and everything to everything.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlprompt.classification.protocols import Cell, ProtocolResult, coop_fewshot
from vlprompt.classification.transfer_matrix import TransferMatrix
from vlprompt.experiments.old_gains import paired_gains
from vlprompt.experiments.statistics import summarise

__all__ = ["MetaRuns", "Runs", "StageCell", "run_from_scratch_too", "run_multitask", "run_transfer"]

Numbers = Mapping[str, float]
_COUNTS = ("runs", "runs_failed")
_MEASURES = ("accuracy", "score")  # a data set's own measure may be another than accuracy


@dataclass(frozen=True)
class StageCell(Cell):
    """A cell of one stage of a run, for example the same task from scratch.

    Attributes:
        stage: Put before the name, so that stages keep apart.
    """

    stage: str = ""

    @property
    def name(self) -> str:
        """See :attr:`Cell.name`."""
        return f"{self.stage}_{super().name}"


class Runs(Protocol):
    """What the stages ask of a run (see :mod:`vlprompt.classification.experiment`)."""

    config: Any
    facts: dict[str, Any]
    matrix: TransferMatrix | None

    def run_cell(self, cell: Cell, start: Sequence[str] | None = None) -> Numbers:
        """Train and score a task from saved prompts, none for from scratch; None: as ``target.init_from`` says."""

    def run_group(self, cell: Cell, names: Sequence[str]) -> Numbers:
        """Train and score several tasks together; a task's numbers are called ``<task>/<metric>``."""

    def prompt_folder(self, cell: Cell) -> Path:
        """Return where a cell's prompts are saved."""


class MetaRuns(Protocol):
    """What meta-training asks of a run."""

    config: Any

    def run_meta_cell(self, cell: Cell) -> Numbers:
        """Meta-train once; the figures are those on held-out domains."""


def run_multitask(runs: Runs) -> ProtocolResult:
    """Train groups of data sets together; then, if configured, targets from their prompts, and all from scratch.

    Returns:
        With targets: their figures without prefix, the source's below ``source/``. Without: the groups' figures.
        ``scratch/`` and ``gain/`` (see :func:`paired_gains`) if a comparison was asked for.
    """
    config, target = runs.config, runs.config.target
    groups: dict[str, list[str]] = config.multitask.groups or {"source": config.data.names}
    shots, seeds = config.protocol.shots, config.protocol.seeds
    source = coop_fewshot(list(groups), lambda cell: runs.run_group(cell, groups[cell.dataset]), shots, seeds)
    parts = [("", "", source)]
    names = list(dict.fromkeys(name for members in groups.values() for name in members))
    compared: dict[str, Mapping[Cell, Numbers]]
    compared = {g if len(groups) > 1 else "": _by_task(source, g, members) for g, members in groups.items()}
    if target.names:
        names, shots = target.names, target.shots or shots
        tuned = coop_fewshot(names, lambda cell: _tune(runs, cell), shots, seeds)
        parts, compared = [("", "target", tuned), ("source/", "", source)], {"": tuned.cells}
        runs.facts["targets"] = names
        runs.facts["target_start"] = f"{target.start} of the source prompts of this run"
    if not target.compare_scratch:
        return _joined("multitask", parts)
    scratch = coop_fewshot(names, lambda cell: runs.run_cell(_staged(cell, "scratch"), []), shots, seeds)
    result = _joined("multitask", [*parts, ("scratch/", "scratch", scratch)])
    for group, cells in compared.items():
        gains = _gains(cells, scratch.cells)
        result.metrics |= {f"{group}/{k}" if group else k: v for k, v in gains.items()}
    return result


def run_from_scratch_too(
    runs: Runs, protocol: Callable[[Callable[[Cell], Numbers]], ProtocolResult]
) -> ProtocolResult:
    """Run a protocol of single tasks, and the same from scratch if the configuration asks for a comparison."""
    ours = protocol(runs.run_cell)
    if not runs.config.target.compare_scratch:
        return ours
    scratch = protocol(lambda cell: runs.run_cell(_staged(cell, "scratch"), []))
    result = _joined(ours.protocol, [("", "", ours), ("scratch/", "scratch", scratch)])
    result.headline = ours.headline
    base_to_new = ours.headline == "harmonic_mean"
    result.metrics |= _gains(ours.cells, scratch.cells, ("new/accuracy",) if base_to_new else _MEASURES)
    return result


def run_transfer(runs: Runs) -> ProtocolResult:
    """Tune every task from every task's prompts: a matrix of relative gains over starting from scratch.

    A source prompt and what is tuned from it share a seed. The diagonal, a task tuned again from its own prompt,
    is the control: what a second round of training alone is worth.
    """
    names, seeds = runs.config.data.names, runs.config.protocol.seeds
    shots = [max(runs.config.protocol.shots)]
    scratch = coop_fewshot(names, lambda cell: runs.run_cell(_staged(cell, "scratch"), []), shots, seeds)
    parts = [("scratch/", "scratch", scratch)]
    for source in names:
        stage = f"from-{source.replace('/', '-')}"

        def tune(cell: Cell, source: str = source, stage: str = stage) -> Numbers:
            origin = runs.prompt_folder(StageCell(source, cell.shots, cell.seed, stage="scratch"))
            return runs.run_cell(_staged(cell, stage), [str(origin)])

        parts.append((f"{stage}/", stage, coop_fewshot(names, tune, shots, seeds)))
    result = _joined("transfer", parts)
    accuracy = np.array([[_mean(part, name) for name in names] for _, _, part in parts])
    runs.matrix = TransferMatrix(tuple(names), accuracy[0], accuracy[1:])
    result.metrics |= runs.matrix.metrics()
    result.headline = "mean_gain_accuracy"
    return result


def _gains(
    ours: Mapping[Cell, Numbers], theirs: Mapping[Cell, Numbers], measures: Sequence[str] = _MEASURES
) -> dict[str, float]:
    """Return the paired gains in every measure that all cells have; the score only where it says something new."""
    cells = [*ours.values(), *theirs.values()]
    known = [m for m in measures if cells and all(m in numbers for numbers in cells)]
    if len(known) > 1 and all(numbers["score"] == numbers["accuracy"] for numbers in cells):
        known = ["accuracy"]
    return {k: v for m in known for k, v in paired_gains(ours, theirs, m).items()}


def _tune(runs: Runs, cell: Cell) -> Numbers:
    """Tune one target from the source prompts with as many shots, or the most there are."""
    protocol = runs.config.protocol
    shots = cell.shots if cell.shots in protocol.shots else max(protocol.shots)
    seeds = [cell.seed] if runs.config.target.start == "seed" else protocol.seeds
    start = [str(runs.prompt_folder(Cell("source", shots, seed))) for seed in seeds]
    return runs.run_cell(_staged(cell, "target"), start)


def _by_task(source: ProtocolResult, group: str, members: Sequence[str]) -> dict[Cell, Numbers]:
    """Return a group's cells as if each task had been a cell of its own."""
    return {
        Cell(name, cell.shots, cell.seed): {
            m: numbers[f"{name}/{m}"] for m in _MEASURES if f"{name}/{m}" in numbers
        }
        for cell, numbers in source.cells.items()
        if cell.dataset == group
        for name in members
    }


def _joined(protocol: str, parts: Sequence[tuple[str, str, ProtocolResult]]) -> ProtocolResult:
    """Put results side by side: metrics below a prefix each, cells marked with a stage each."""
    result = ProtocolResult(protocol)
    for prefix, stage, part in parts:
        result.metrics |= {f"{prefix}{k}": v for k, v in part.metrics.items() if k not in _COUNTS}
        result.cells |= {_staged(cell, stage): numbers for cell, numbers in part.cells.items()}
        result.failures += part.failures
    result.metrics |= {k: sum(part.metrics[k] for _, _, part in parts) for k in _COUNTS}
    result.headline = "accuracy" if "accuracy" in result.metrics else "score"
    return result


def _staged(cell: Cell, stage: str) -> Cell:
    if not stage:
        return cell
    return StageCell(**{f.name: getattr(cell, f.name) for f in fields(Cell)}, stage=stage)


def _mean(result: ProtocolResult, name: str) -> float:
    """Return the mean over seeds of a task's own measure (mostly accuracy), NaN if there is none."""
    found = [numbers["score"] for cell, numbers in result.cells.items() if cell.dataset == name]
    return summarise(found).mean if found else float("nan")
