"""Several configurations in one table, or in one per part: the same protocol, data and seeds for every method."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlprompt.classification.config import RunConfig, load_config
from vlprompt.classification.experiment import Outcome, run
from vlprompt.classification.side_by_side import side_by_side
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.core.files import write_text
from vlprompt.core.options import describe_problems
from vlprompt.experiments import tables
from vlprompt.experiments.cells import Cell
from vlprompt.experiments.old_config import read_yaml
from vlprompt.experiments.old_gains import paired_gains
from vlprompt.experiments.statistics import Summary

__all__ = ["Comparison", "ComparisonOutcome", "compare"]

log = logging.getLogger("vlprompt.compare")


class Comparison(BaseModel):
    """Options of :func:`compare`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("comparison", pattern=r"^[\w.-]+$", description="folder under output")
    output: str = "runs"
    runs: dict[str, str] = Field(
        min_length=1,
        description="row name to a configuration and its own overrides, for example "
        "{vpt: vpt_tiny.yaml, shallow: vpt_tiny.yaml learner.visual_depth=1}",
    )
    shared: list[str] = Field(default_factory=list, description="overrides of all runs")
    before: dict[str, str] = Field(
        default_factory=dict,
        description="configurations that are run first and are no rows, for example a meta-training that rows start "
        "from; they lie in <output>/<name>/<label>",
    )
    parts: dict[str, list[str]] = Field(
        default_factory=dict,
        description="title to overrides of all runs: a table per part, one below the other",
    )
    baseline: str | dict[str, str | list[str]] | None = Field(
        None, description="row that the others' paired gains are over, or one or several for each row"
    )

    @classmethod
    def read(cls, cfg: str | Path, overrides: Sequence[str] = ()) -> Comparison:
        """Read a configuration file; ``overrides`` are overrides of all its runs.

        Raises:
            ConfigError: With every mistake at once.
            UnknownNameError: If there is no such file.
        """
        raw = read_yaml(cfg, tool="compare")
        try:
            found = cls.model_validate({**raw, "shared": [*raw.get("shared", []), *overrides]})
        except ValidationError as error:
            raise ConfigError(describe_problems(error, cls), str(cfg)) from error
        named = [found.baseline] if isinstance(found.baseline, str) else []
        named += [row for pair in found.baselines() for row in pair]
        if strange := [row for row in named if row not in found.runs]:
            raise ConfigError(
                [f"baseline: {strange[0]!r} is none of the runs: {', '.join(found.runs)}."], str(cfg)
            )
        return found

    def baselines(self) -> list[tuple[str, str]]:
        """Return every (row, row it is compared with)."""
        if isinstance(self.baseline, dict):
            several = {k: [v] if isinstance(v, str) else v for k, v in self.baseline.items()}
            return [(row, other) for row, others in several.items() for other in others]
        return [(row, self.baseline) for row in self.runs if self.baseline and row != self.baseline]

    def first(self) -> dict[str, RunConfig]:
        """Return the resolved configurations of ``before``.

        Raises:
            ConfigError: With the mistakes of all of them.
        """
        return self._load({label: (words, [f"name={label}"]) for label, words in self.before.items()})

    def configs(self, part: str | None = None) -> dict[str, RunConfig]:
        """Return the resolved configuration of every run.

        Args:
            part: One of ``parts``, if there are any.

        Raises:
            ConfigError: With the mistakes of all runs.
        """
        overrides = self.parts[part] if part else []
        return self._load({label: (words, [*overrides, *self.shared]) for label, words in self.runs.items()})

    def _load(self, runs: Mapping[str, tuple[str, list[str]]]) -> dict[str, RunConfig]:
        found: dict[str, RunConfig] = {}
        problems: list[str] = []
        folder = f"output={Path(self.output) / self.name}"
        for label, (words, overrides) in runs.items():
            cfg, *own = shlex.split(words)
            try:
                found[label] = load_config(cfg, [*own, *overrides, folder])
            except ConfigError as error:
                problems += [f"{label}: {problem}" for problem in error.problems]
        if problems:
            raise ConfigError(problems, f"runs of {self.name}")
        return found


@dataclass(frozen=True)
class ComparisonOutcome:
    """What a comparison produced.

    Attributes:
        folder: Holds ``comparison.md``, ``.csv`` and ``.tex`` (of each part) and a folder per run.
        text: The Markdown tables.
        failures: One sentence per run or cell that failed.
    """

    folder: Path
    text: str
    failures: list[str]


def compare(comparison: Comparison, resume: bool = False) -> ComparisonOutcome:
    """Run every configuration; one that fails is reported at the end, and the others go on.

    Args:
        comparison: What to run.
        resume: Keep what finished before.

    Raises:
        ConfigError: If any configuration is wrong, before the first one runs.
        VLPromptError: If no run finished.
    """
    first, parts = comparison.first(), list(comparison.parts) or [""]
    planned = {part: comparison.configs(part or None) for part in parts}
    failures: list[str] = []
    for label, config in first.items():
        log.info("--- %s", label)
        failures += [f"{label}: {failure}" for failure in run(config, resume).failures]
    folder, texts = Path(comparison.output) / comparison.name, []
    finished: dict[str, dict[str, Outcome]] = {part: {} for part in parts}
    for part, configs in planned.items():
        for label, config in configs.items():
            name = f"{part}, {label}" if part else label
            log.info("--- %s", name)
            try:
                finished[part][label] = run(config, resume)
                failures += [f"{name}: {failure}" for failure in finished[part][label].failures]
            except VLPromptError as error:
                failures.append(f"{name}: {error}")
        if finished[part]:
            texts.append(_write_part(comparison, folder, part, finished[part]))
            write_text(folder / "comparison.md", "\n".join(texts))  # so far: a kill must not cost the tables
    if not texts:
        raise VLPromptError(f"no run of {comparison.name} finished: {'; '.join(failures)}")
    return ComparisonOutcome(folder, "\n".join(texts), failures)


def _write_part(comparison: Comparison, folder: Path, part: str, finished: Mapping[str, Outcome]) -> str:
    """Write the tables of one part as CSV and LaTeX, and return its Markdown."""
    shown = [{**outcome.metrics, "learner": label} for label, outcome in finished.items()]
    mark = "".join(c if c.isalnum() else "-" for c in part)
    for form, suffix in (("csv", "csv"), ("latex", "tex")):
        table = side_by_side(shown, form)  # type: ignore[arg-type]  # the literal's values
        write_text(folder / f"comparison{'-' if mark else ''}{mark}.{suffix}", table)
    gains = _gains(finished, comparison.baselines())
    title = f"## {part}\n\n" if part else ""
    return title + side_by_side(shown, "markdown") + (f"\n{gains}" if gains else "")


def _gains(finished: Mapping[str, Outcome], baselines: Sequence[tuple[str, str]]) -> str:
    """Return a table of paired gains per baseline, in points, with intervals over seeds and over tasks."""
    rows: dict[str, list[tables.Row]] = {}
    for label, baseline in baselines:
        if label not in finished or baseline not in finished:
            continue
        outcome = finished[label]
        metric = "accuracy" if outcome.headline.endswith("accuracy") else outcome.headline
        flat = paired_gains(_cells(outcome), _cells(finished[baseline]), metric)
        values = {
            f"{key.split('/')[1].removeprefix('shots')}-shot {metric}, {what}": Summary(
                flat[key], None, flat.get(f"{key}_ci95"), 0
            )
            for key in flat
            for kind, what in (("gain", "seeds"), ("gain_over_tasks", "tasks"))
            if key.startswith(f"{kind}/shots") and key.endswith(metric)
        }
        rows.setdefault(baseline, []).append(tables.Row(label, dict(values)))
    return "\n".join(
        f"Gain over {baseline} in points, paired, with 95 % intervals over seeds and over tasks:\n\n"
        f"{tables.to_markdown(own, best=False)}"
        for baseline, own in rows.items()
    )


def _cells(outcome: Outcome) -> dict[Cell, dict[str, Any]]:
    """Return the numbers of every cell; where there are targets, only theirs count, each as a task of its own."""
    cells = json.loads((outcome.folder / "cells.json").read_text(encoding="utf-8"))["cells"]
    across = any(c.get("target") for c in cells)
    return {
        Cell(f"{c['dataset']} on {c['target']}" if across else c["dataset"], c["shots"], c["seed"]): c[
            "metrics"
        ]
        for c in cells
        if bool(c.get("target")) == across
    }
