"""Which task's prompts help which: the matrix of relative gains, the ranking of sources, groups, and their files.

Shen et al., "Multitask Vision-Language Prompt Tuning" (arXiv 2211.11720), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from vlprompt.core.csv_text import csv_text
from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json, write_text

__all__ = ["TransferMatrix"]


@dataclass(frozen=True)
class TransferMatrix:
    """Accuracy (or the data set's own score) of N tasks, each from scratch and from the prompts of each.

    Attributes:
        names: N tasks.
        scratch: (N,) fractions; NaN where a run is missing.
        accuracy: (N, N) fractions: row i is the source, column j the target.
    """

    names: tuple[str, ...]
    scratch: np.ndarray
    accuracy: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.scratch.shape != (count,) or self.accuracy.shape != (count, count):
            raise DataError(
                f"{count} tasks need {count} accuracies from scratch and {count} x {count} from sources, got "
                f"{self.scratch.shape} and {self.accuracy.shape}."
            )

    def gains(self) -> np.ndarray:
        """Return (N, N) relative gains R[i, j] = 100 (acc_ij - acc_j) / acc_j in percent, acc_j from scratch."""
        base = np.where(self.scratch > 0, self.scratch, np.nan)
        return 100 * (self.accuracy - base) / base

    def ranking(self) -> list[tuple[str, float]]:
        """Return the sources and their mean rank over the other tasks, the most helpful first (1 is the best rank).

        A task is no source for itself here; equal gains share their mean rank; targets with a gap are left out.
        """
        gains = self.gains()
        ranks = np.full(gains.shape, np.nan)

        for target in range(len(self.names)):
            others = [i for i in range(len(self.names)) if i != target]
            if others and np.isfinite(gains[others, target]).all():
                ranks[others, target] = rankdata(-gains[others, target])

        means = [
            float(np.mean(row[np.isfinite(row)])) if np.isfinite(row).any() else math.nan for row in ranks
        ]
        return sorted(zip(self.names, means, strict=True), key=lambda pair: (math.isnan(pair[1]), pair[1]))

    def groups(self) -> list[tuple[str, ...]]:
        """Return the tasks in groups that help each other, to be tuned together (``multitask.groups``).

        Average linkage on the mean of both directions' gains: the two groups with the largest are merged as long as it
        is above 0; a gap is no help. The paper names its groups and gives no rule; this one is ours.
        """
        gains = np.nan_to_num(self.gains(), nan=-math.inf)
        mutual = (gains + gains.T) / 2

        members = [[i] for i in range(len(self.names))]
        while len(members) > 1:
            pairs = [(a, b) for b in range(len(members)) for a in range(b)]
            best, (a, b) = max(
                ((float(mutual[np.ix_(members[a], members[b])].mean()), (a, b)) for a, b in pairs),
                key=lambda scored: scored[0],
            )
            if best <= 0:
                break
            members[a] = sorted(members[a] + members.pop(b))

        return [tuple(self.names[i] for i in group) for group in members]

    def metrics(self) -> dict[str, float]:
        """Return flat keys for metrics.json: differences in accuracy (fractions) and sources' mean ranks."""
        difference = self.accuracy - self.scratch
        flat = {
            f"{i}->{j}/gain_accuracy": float(difference[a, b])
            for a, i in enumerate(self.names)
            for b, j in enumerate(self.names)
            if np.isfinite(difference[a, b])
        }

        off = difference[~np.eye(len(self.names), dtype=bool)]
        if np.isfinite(off).any():
            flat["mean_gain_accuracy"] = float(np.nanmean(off))
        return flat | {f"{name}/mean_rank": r for name, r in self.ranking() if not math.isnan(r)}

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-able data; gaps are null."""
        return {
            "tasks": list(self.names),
            "scratch_accuracy": _rows(self.scratch),
            "accuracy": _rows(self.accuracy),
            "relative_gain_percent": _rows(self.gains()),
            "sources_by_mean_rank": [[name, None if math.isnan(r) else r] for name, r in self.ranking()],
            "helpful_groups": [list(group) for group in self.groups()],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TransferMatrix:
        """Return what :meth:`record` described."""
        scratch, accuracy = (np.array(record[k], dtype=float) for k in ("scratch_accuracy", "accuracy"))
        return cls(tuple(record["tasks"]), scratch, accuracy)

    def text(self) -> str:
        """Return the matrix, the ranking and the groups as lines for a terminal; gains in percent, sources in rows."""
        width = max(map(len, self.names)) + 1
        lines = [" " * width + "".join(f"{n[-9:]:>10}" for n in self.names)]

        for name, row in zip(self.names, self.gains(), strict=True):
            lines.append(f"{name:<{width}}" + "".join(f"{value:>+10.1f}" for value in row))

        ranks = ", ".join(f"{name} {rank:.2f}" for name, rank in self.ranking())
        groups = "; ".join(", ".join(group) for group in self.groups())
        return "\n".join([*lines, f"sources by mean rank: {ranks}", f"groups that help each other: {groups}"])

    def figure(self) -> str:
        """Return the heat map as SVG for a page."""
        from vlprompt.experiments import figures  # matplotlib takes a second to import

        return figures.transfer_matrix(self.names, self.gains())[0]

    def write(self, folder: Path) -> list[Path]:
        """Write ``transfer.json``, ``transfer.csv`` (gains in percent) and ``transfer.png``; return their paths."""
        from vlprompt.experiments import figures

        png = figures.transfer_matrix(self.names, self.gains())[1]
        rows = [
            (name, *(_gain(value) for value in row))
            for name, row in zip(self.names, self.gains(), strict=True)
        ]
        write_json(folder / "transfer.json", self.record())
        write_text(folder / "transfer.csv", csv_text(("source", *self.names), rows))
        write_atomic(folder / "transfer.png", lambda path: _write(path, png))
        return [folder / f"transfer.{ending}" for ending in ("json", "csv", "png")]


def _rows(values: np.ndarray) -> Sequence[Any]:
    return [_rows(v) if np.ndim(v) else (float(v) if math.isfinite(v) else None) for v in values]


def _gain(value: float) -> float | str:
    """Return a gain as a cell, rounded to four digits; empty for a gap."""
    return round(float(value), 4) if math.isfinite(value) else ""


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
