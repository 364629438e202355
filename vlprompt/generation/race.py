"""Who is there first: steps and seconds to the best similarity that the baseline ever reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlprompt.experiments.statistics import summarise

__all__ = ["Race", "summary_table"]

_LAST = 3  # records whose mean is what a method reaches in the end


@dataclass
class Race:
    """What every method measured on one concept.

    Attributes:
        concept: Its name.
        results: Label to ``start`` and ``seconds``, and the ``history`` of steps, seconds and similarities.
    """

    concept: str
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, label: str, result: Mapping[str, Any]) -> None:
        """Take a method's measures in."""
        self.results[label] = dict(result)

    def final(self, label: str) -> float:
        """Return the similarity a method reaches: the mean of its last three records."""
        return float(np.mean([r["similarity"] for r in self.results[label]["history"][-_LAST:]]))

    def best(self, label: str) -> float:
        """Return the highest similarity a method ever had."""
        return max(float(r["similarity"]) for r in self.results[label]["history"])

    def arrival(self, label: str, goal: float) -> tuple[float, float] | None:
        """Return (steps, seconds of training) after which a method was first at the goal; None if never."""
        for record in self.results[label]["history"]:
            if record["similarity"] >= goal:
                return record["step"], record["seconds"]
        return None

    def seconds_per_step(self, label: str) -> float:
        """Return the mean over all steps."""
        last = self.results[label]["history"][-1]
        return last["seconds"] / max(1.0, last["step"])

    def record(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"concept": self.concept, **self.results}

    def drawing(self) -> tuple[str, str]:
        """Return a text and an SVG of similarity by step."""
        from vlprompt.experiments.figures import curves

        lines = {
            label: [(r["step"], r["similarity"]) for r in result["history"]]
            for label, result in self.results.items()
        }
        text = "Similarity of drawn images to images of the concept that no search saw."
        return text, curves(lines, "step", "similarity")


def summary_table(races: Sequence[Race], baseline: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return a Markdown table over all concepts, and its numbers.

    Args:
        races: One per concept.
        baseline: The method whose best similarity is the goal; None: the first one.
    """
    labels = list(races[0].results)
    base = baseline or labels[0]
    lines = [
        f"| method | similarity at the start | best | at the end | ms per step | steps to {base}'s best | seconds "
        "| times faster |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    metrics: dict[str, Any] = {}
    for label in labels:
        row = _row(races, label, base)
        metrics |= {f"{label}/{k}": v if np.isfinite(v) else None for k, v in row.items()}
        there = f"{row['arrived']:.0f} of {len(races)}" if row["arrived"] < len(races) else ""
        cells = [f"{row[key]:.3f}" for key in ("first", "best", "last")]
        cells += [
            f"{1000 * row['seconds_per_step']:.0f}",
            f"{_or_never(row['steps'], '.0f')} {there}".strip(),
        ]
        cells += [_or_never(row["seconds"], ".1f"), _or_never(row["speedup"], ".1f")]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    note = (
        f"Means over {len(races)} concepts; times faster: the ratio of the sums of seconds, over the concepts where "
        "both arrive. Drawing images to measure is not timed."
    )
    return "\n".join([*lines, "", note, ""]), metrics


def _row(races: Sequence[Race], label: str, base: str) -> dict[str, float]:
    found = [(race.arrival(label, race.best(base)), race.arrival(base, race.best(base))) for race in races]
    both = [(mine, theirs) for mine, theirs in found if mine is not None and theirs is not None]
    nan = float("nan")
    mine, theirs = sum(m[1] for m, _ in both), sum(t[1] for _, t in both)
    return {
        "first": summarise([race.results[label]["history"][0]["similarity"] for race in races]).mean,
        "best": summarise([race.best(label) for race in races]).mean,
        "last": summarise([race.final(label) for race in races]).mean,
        "seconds_per_step": summarise([race.seconds_per_step(label) for race in races]).mean,
        "arrived": float(len(both)),
        "steps": summarise([m[0] for m, _ in both]).mean if both else nan,
        "seconds": mine / len(both) if both else nan,
        "speedup": theirs / mine if both and mine > 0 else (float("inf") if both else nan),
    }


def _or_never(value: float, form: str) -> str:
    return "never" if value != value else ("at once" if value == float("inf") else format(value, form))
