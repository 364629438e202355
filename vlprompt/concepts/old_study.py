"""Runs that search concepts with every number of images and seed: what detection and segmentation share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlprompt.core.files import write_json, write_text
from vlprompt.experiments.old_folder import environment
from vlprompt.experiments.report import RunRecord, write_report
from vlprompt.experiments.statistics import summarise
from vlprompt.experiments.tables import Row, to_markdown

__all__ = ["ConceptOutcome", "Scores", "search_all", "write_outcome"]

log = logging.getLogger("vlprompt.concepts")

Scores = dict[str, dict[str, list[float]]]
"""Row of the table to key to a value per seed."""


@dataclass(frozen=True)
class ConceptOutcome:
    """What a run produced.

    Attributes:
        folder: Holds concept files, ``metrics.json``, ``results.md`` and the report.
        metrics: The content of ``metrics.json``.
        table: Markdown.
    """

    folder: Path
    metrics: dict[str, Any]
    table: str


def search_all(
    rows: Scores,
    sizes: Sequence[int | None],
    seeds: Sequence[int],
    run_cell: Callable[[int | None, int], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Run every cell, add its scores to ``rows``, and return the last one's history.

    Args:
        rows: What is known already: scores of names; changed in place.
        sizes: Numbers of training images; None is all of them.
        seeds: Of each number.
        run_cell: (size, seed) -> ``scores`` by stage (``first``, ``second``) and ``history``.
    """
    history: list[dict[str, Any]] = []
    for size in sizes:
        label = f"concepts, {size or 'all'} images"
        for seed in seeds:
            log.info("%s, seed %d", label, seed)
            cell = run_cell(size, seed)
            history = cell["history"]
            for stage, scores in cell["scores"].items():
                row = rows.setdefault(label if stage == "first" else f"{label}, second stage", {})
                for key, value in scores.items():
                    row.setdefault(key, []).append(value)
    return history


def write_outcome(
    folder: Path,
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    facts: Mapping[str, Any],
    *,
    title: str,
    headline: tuple[str, str],
    history: list[dict[str, Any]],
    command: str,
) -> ConceptOutcome:
    """Write metrics, table and report.

    Args:
        folder: Of the run; holds ``config.yaml``.
        rows: See :data:`Scores`; ``seconds`` go below the table.
        facts: What ``metrics.json`` says beside figures; ``seeds`` among them.
        title: Of the report.
        headline: The key whose means open the report, and its name there.
        history: Of one search, for the report's curves.
        command: Shown in the report.
    """
    found = {label: {k: summarise(v) for k, v in row.items()} for label, row in rows.items()}
    metrics: dict[str, Any] = {**facts, "threads": torch.get_num_threads()}
    for label, row in found.items():
        for key, value in row.items():
            metrics |= value.flat(f"{label}/{key}")
    lines = [Row(label, {k: v for k, v in row.items() if k != "seconds"}) for label, row in found.items()]
    seconds = [f"{label}: {row['seconds'].mean:.1f} s" for label, row in found.items() if "seconds" in row]
    table = to_markdown(lines) + f"\nSearch, encoding of the images included: {'; '.join(seconds)}.\n"
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "results.md", table)
    key, name = headline
    record = RunRecord(
        title=title,
        headline={label: row[key].mean for label, row in found.items()},
        summary=f"{name}; {len(facts['seeds'])} seeds.",
        history=history,
        metrics={k: v for k, v in metrics.items() if isinstance(v, float)},
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        command=command,
        environment=environment(),
    )
    write_report(folder / "report.html", record)
    return ConceptOutcome(folder, metrics, table)
